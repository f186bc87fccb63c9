import pytest

from vlm.nodes.hosts.hostfile import Host
from vlm.nodes.launcher.connection import Place
from vlm.nodes.launcher.outcome import Fault, Outcome, Tally

PLACES = [Place(Host(name, 8), count, name, "lo") for name, count in (("a", 2), ("b", 3))]


def test_nothing_failed() -> None:
    tally = Tally(PLACES)
    tally.ended(0, 0, 0, [])
    tally.ended(1, 4, None, [])  # what it ended with is for the agent to say
    tally.done(0, [])
    tally.done(1, [])
    tally.lose(1, "its connection ends")
    assert tally.outcome() == Outcome(0, None, frozenset()) and not tally.failed


@pytest.mark.parametrize(
    ("code", "expected", "reason"),
    [
        (3, 3, "ended with code 3"),
        (75, 75, "ended with code 75"),
        (-15, 143, "was killed by SIGTERM"),
    ],
)
def test_the_first_to_fail_counts(code: int, expected: int, reason: str) -> None:
    tally = Tally(PLACES)
    tally.ended(0, 1, 0, [])
    tally.ended(1, 3, code, ["last words"])
    tally.ended(0, 0, 9, [])
    tally.lose(0, "gone")
    found = tally.outcome()
    assert found.code == expected and found.lost == {"a"} and found.fault is not None
    assert (found.fault.host, found.fault.rank, found.fault.reason) == ("b", 3, reason)
    assert found.fault.lines == ("last words",)


def test_a_code_that_only_the_agent_knows() -> None:
    tally = Tally(PLACES)
    tally.ended(1, 2, None, [])
    tally.ended(1, 3, -9, [])  # its own host has ended it, because of the other one
    assert not tally.failed
    tally.done(1, [(2, 7, ["last words"])])
    found = tally.outcome()
    assert found.code == 7
    assert found.fault is not None and found.fault.lines == ("last words",)


def test_a_host_is_lost_and_a_hang() -> None:
    tally = Tally(PLACES)
    tally.lose(1, "refused")
    found = tally.outcome()
    assert found.code == 1 and found.lost == {"b"} and found.fault is not None
    assert found.fault.rank is None and found.fault.reason == "refused"
    waiting = Tally(PLACES)
    waiting.hung(None, "they wait for each other", [])
    assert waiting.outcome().fault == Fault(None, None, "they wait for each other")
    hung = Tally(PLACES)
    hung.hung(4, "no step for 300 s", ["waiting for a.tar"])
    found = hung.outcome()
    assert found.hung and found.fault is not None and found.fault.host == "b"
