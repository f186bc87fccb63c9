from vlm.heartbeat import Beat
from vlm.nodes.hang import OTHER_S, TIMES_MEDIAN, Pulse, Stack, blame, describe


def pulse(num_steps: int, step_s: float, least_s: float = 1.0) -> tuple[Pulse, float]:
    """Two ranks in step; and the time of what was said last."""
    found, now = Pulse(2, least_s), 100.0
    for step in range(num_steps):
        now += step_s
        for rank in (0, 1):
            found.hear(rank, Beat("train", step, now), now)
    return found, now


def test_silence_counts_in_medians_and_never_below_the_least() -> None:
    found, now = pulse(10, 2.0)
    assert found.median_s == 2.0
    assert found.silent_s(now + 2.0 * TIMES_MEDIAN - 1) is None
    assert found.silent_s(now + 2.0 * TIMES_MEDIAN + 1) == 2.0 * TIMES_MEDIAN + 1
    patient, now = pulse(10, 2.0, least_s=500)
    assert patient.silent_s(now + 499) is None and patient.silent_s(now + 501) == 501


def test_what_is_no_step_may_take_long() -> None:
    found, now = pulse(10, 0.1)
    found.hear(0, Beat("save", 9, now), now)
    assert found.silent_s(now + 100) is None
    assert found.silent_s(now + OTHER_S + 1) is not None


def test_who_never_beats_never_hangs() -> None:
    assert Pulse(2, 1.0).silent_s(1e9) is None
    half = Pulse(2, 1.0)  # the other one still starts
    half.hear(0, Beat("load", 1, 0), 0)
    assert half.silent_s(OTHER_S - 1) is None and half.silent_s(OTHER_S + 1) is not None


def test_steps_that_were_missed_share_their_time() -> None:
    found = Pulse(1, 1.0)
    for step, now in ((0, 0.0), (4, 8.0), (5, 10.0)):
        found.hear(0, Beat("train", step, now), now)
    assert found.median_s == 2.0


def test_blame() -> None:
    at = {rank: Beat("train", 7, 0) for rank in range(3)}
    fine = Stack("sleeping", "File ...")
    well = dict.fromkeys(range(3), fine)
    assert blame(at, {**well, 1: Stack("stopped", "")})[0] == 1
    assert blame(at, {**well, 2: Stack("sleeping", "")}) == (2, "it does not answer a signal")
    rank, why = blame({**at, 2: Beat("load", 7, 0)}, well)
    assert rank == 2 and "'train' of step 7" in why
    assert blame({**at, 0: Beat("train", 6, 0), 2: Beat("load", 7, 0)}, well)[0] == 0
    assert blame(at, well)[0] is None


def test_description() -> None:
    assert describe(None) == "it never began a step"
    beat = Beat("train", 3, 0, ("a.tar", "b.tar"))
    assert describe(beat) == "in 'train' of step 3 with samples of a.tar, b.tar"
