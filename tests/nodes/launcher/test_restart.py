import pytest

from vlm.nodes.hosts.hostfile import Host
from vlm.nodes.hosts.verdict import Verdict
from vlm.nodes.launcher import restart
from vlm.nodes.launcher.outcome import Outcome
from vlm.nodes.launcher.restart import LONGEST_WAIT_S, Restarts

LONG_S = 3600.0


def ended(code: int) -> Outcome:
    return Outcome(code, None, frozenset())


@pytest.mark.parametrize("code", [0, 2])
def test_what_never_restarts(code: int) -> None:
    assert Restarts(5, None).after(ended(code), LONG_S, asked=False).wait_s is None


def test_who_asked_for_the_end_gets_it() -> None:
    assert Restarts(5, None).after(ended(75), LONG_S, asked=True).wait_s is None
    assert Restarts(5, None).after(ended(137), LONG_S, asked=True).wait_s is None


def test_preemptions_are_not_counted() -> None:
    restarts = Restarts(1, None)
    for _ in range(50):
        assert restarts.after(ended(75), LONG_S, asked=False).wait_s == 0
    assert restarts.after(ended(75), 1.0, asked=False).wait_s > 0  # type: ignore[operator]
    assert restarts.num_failures == 0 and restarts.num_preemptions == 51
    assert restarts.after(ended(1), LONG_S, asked=False).wait_s is not None


def test_a_time_limit_is_no_preemption() -> None:
    restarts = Restarts(5, 100.0)
    assert restarts.after(ended(75), 100.0, asked=False).wait_s is None
    assert restarts.after(ended(75), 99.0, asked=False).wait_s is not None


def test_failures_are_bounded_and_wait_longer_each_time() -> None:
    restarts = Restarts(12, None)
    waits = [restarts.after(ended(137), LONG_S, asked=False).wait_s for _ in range(12)]
    assert waits[:4] == [5, 10, 20, 40] and waits[-1] == LONGEST_WAIT_S
    assert restarts.after(ended(137), LONG_S, asked=False).wait_s is None


def test_world_size() -> None:
    for slots in range(1, 20):
        for batches in range(1, 20):
            every = [n for n in range(1, slots + 1) if batches % n == 0]
            assert restart.world_size(slots, batches) == max(every)
    assert restart.world_size(7, None) == 7 and restart.world_size(0, 4) == 0


def test_places() -> None:
    verdicts = [Verdict(Host(name, 8), iface="ens1") for name in "abc"]
    for index, verdict in enumerate(verdicts):
        verdict.facts["address"] = f"10.0.0.{index}"
    verdicts[0].problems.append("down")
    found = restart.places(verdicts, 12)
    assert [(p.host.name, p.num_ranks, p.address) for p in found] == [
        ("b", 8, "10.0.0.1"),
        ("c", 4, "10.0.0.2"),
    ]
    assert [p.num_ranks for p in restart.places(verdicts, 8)] == [8]  # one is enough
    assert restart.places(verdicts[:1], 8) == []
