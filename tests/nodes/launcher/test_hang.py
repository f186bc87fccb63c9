from vlm.heartbeat import Beat
from vlm.nodes.launcher.hang import OTHER_S, TIMES_MEDIAN, Pulse, Stack, blame, describe


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


def test_an_evaluation_or_a_save_is_measured_by_those_before() -> None:
    found, now = pulse(10, 0.1, least_s=30)
    for step, took_s in ((10, 3.0), (20, 5.0), (30, 4.0)):
        for phase, lasted_s in (("save", took_s), ("train", 0.1)):
            for rank in (0, 1):
                found.hear(rank, Beat(phase, step, now), now)
            now += lasted_s
    found.hear(0, Beat("save", 40, now), now)  # the other one is still in its step
    assert found.silent_s(now + 4.0 * TIMES_MEDIAN - 1) is None
    assert found.silent_s(now + 4.0 * TIMES_MEDIAN + 1) == 4.0 * TIMES_MEDIAN + 1
    found.hear(1, Beat("evaluate", 40, now), now)  # that was never measured
    assert found.silent_s(now + OTHER_S - 1) is None


def test_a_wait_is_not_measured_by_those_before() -> None:
    found, now = pulse(10, 0.1, least_s=30)
    for step in range(10, 20):
        for phase in ("save and copy", "train"):
            for rank in (0, 1):
                found.hear(rank, Beat(phase, step, now), now)
            now += 0.1
    found.hear(0, Beat("save and copy", 20, now), now)
    assert found.silent_s(now + OTHER_S - 1) is None and found.silent_s(now + OTHER_S + 1)


def test_an_evaluation_counts_as_a_whole_and_is_never_given_more_than_the_first() -> None:
    found = Pulse(1, 1.0)
    for now in range(60):  # a sign at each of its steps
        found.hear(0, Beat("evaluate", 10, now), now)
    found.hear(0, Beat("load", 11, 60), 60)
    found.hear(0, Beat("evaluate", 20, 61), 61)
    assert found.silent_s(61 + 60 * TIMES_MEDIAN - 1) is None
    assert found.silent_s(61 + 60 * TIMES_MEDIAN + 1) is not None
    found.hear(0, Beat("load", 21, 0), 61 + OTHER_S)
    now = 61 + OTHER_S
    found.hear(0, Beat("evaluate", 30, 0), now)  # of 60 s and half an hour: the longer one
    assert found.silent_s(now + OTHER_S - 1) is None and found.silent_s(now + OTHER_S + 1)


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
