"""What the launcher does around attempts; those are stand-ins here, and real in test_supervise."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.nodes.facts import facts, gpu
from vlm.nodes.hosts.hostfile import Host
from vlm.nodes.hosts.verdict import Verdict, Wanted, judge
from vlm.nodes.launcher import launcher
from vlm.nodes.launcher.connection import Job
from vlm.nodes.launcher.launcher import Launcher, Plan
from vlm.nodes.launcher.outcome import Fault, Outcome
from vlm.nodes.launcher.record import TIMELINE, Record
from vlm.nodes.launcher.restart import Restarts

HOSTS = [Host("a", 2), Host("b", 2)]
JOB = Job("mark", ("x.py",), "python", Path("/"), Path("/logs"), {}, 0.0, 0.0, 1.0)


class World:
    """Hosts that are there or not, and attempts that end as they are told to."""

    def __init__(self, folder: Path, outcomes: Sequence[int | Outcome]) -> None:
        self.folder, self.down = folder, set[str]()
        #: of hosts, where they are not as they should be
        self.gpus: dict[str, list[dict[str, Any]]] = {}
        self.outcomes: Iterator[int | Outcome] = iter(outcomes)
        #: hosts and ranks of each attempt
        self.attempts: list[dict[str, int]] = []
        self.before: Callable[[int], None] = lambda number: None
        #: an attempt lasts until it is told to stop, if it is the one with this number
        self.long: int | None = None

    def look(self, hosts: Sequence[Host]) -> list[Verdict]:
        found = []
        for host in hosts:
            if host.name in self.down:
                found.append(Verdict(host, problems=["ssh: refused"]))
                continue
            gpus = self.gpus.get(host.name, [gpu(0), gpu(1)])
            found.append(Verdict(host, facts=facts(address=host.name, gpus=gpus)))
        judge(found, Wanted((), {}, 0, gpus=True))
        return found

    def attempt(self, job: Job, places: Sequence[Any], *_: Any) -> mock.Mock:
        self.attempts.append({place.host.name: place.num_ranks for place in places})
        number, stopped = len(self.attempts), threading.Event()

        def wait() -> Outcome:
            self.before(number)
            if number == self.long:
                assert stopped.wait(20)
            found = next(self.outcomes)
            return found if isinstance(found, Outcome) else Outcome(found, None, frozenset())

        return mock.Mock(wait=wait, stop=stopped.set, stacks={}, median_step_s=None)

    def run(self, max_restarts: int = 3, micro_batches: int = 4) -> int:
        plan = Plan(JOB, HOSTS, 1, micro_batches, self.look, self.look, self.look, return_s=0.05)
        record = Record(self.folder, "job", [])
        self.made = Launcher(plan, Restarts(max_restarts, None), record)
        return launcher.run(self.made, record)

    def timeline(self) -> str:
        return (self.folder / TIMELINE).read_text()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def make(*outcomes: int | Outcome) -> World:
        made.insert(0, World(tmp_path, outcomes))
        monkeypatch.setattr(launcher, "Attempt", made[0].attempt)
        return made[0]

    monkeypatch.setattr(launcher.restart, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(launcher.ssh, "run", lambda *_, **__: mock.Mock(code=255))
    yield make


def test_success(world: Callable[..., World]) -> None:
    found = world(0)
    assert found.run() == 0 and found.attempts == [{"a": 2, "b": 2}]


def test_all_hosts_must_pass_at_first(world: Callable[..., World]) -> None:
    found = world()
    found.down = {"b"}
    assert found.run() == 1 and found.attempts == []
    assert "FAIL b ssh: refused" in found.timeline()


def test_restarts_end_with_the_last_code(world: Callable[..., World]) -> None:
    found = world(75, 75, 137, 1, 75, 3)
    assert found.run(max_restarts=2) == 3 and len(found.attempts) == 6
    assert "2 restarts are used up" in found.timeline()
    mistaken = world(2)
    assert mistaken.run() == 2 and "a mistake that no restart mends" in mistaken.timeline()


def test_a_dead_host_is_left_out_and_taken_back(world: Callable[..., World]) -> None:
    lost = Outcome(1, Fault("b", None, "the connection was lost"), frozenset({"b"}))
    found = world(lost, 75, 0)
    found.long = 2

    def before(number: int) -> None:
        found.down = {"b"} if number == 1 else set()

    found.before = before
    assert found.run() == 0
    assert found.attempts == [{"a": 2, "b": 2}, {"a": 2}, {"a": 2, "b": 2}]
    assert "b: cannot be looked at" in found.timeline() and "b is back" in found.timeline()


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ([gpu(0)], "FAIL b 1 GPUs for 2 slots"),
        ([gpu(0), gpu(1, ecc_errors=3)], "FAIL b GPU 1 has 3 uncorrected memory errors"),
        ([gpu(0, fault="[GPU is lost]"), gpu(1)], "GPU 0 does not answer: [GPU is lost]"),
    ],
)
def test_a_host_with_a_dead_gpu_is_left_out_and_taken_back(
    world: Callable[..., World], broken: list[dict[str, Any]], said: str
) -> None:
    found = world(1, 75, 0)
    found.long = 2

    def before(number: int) -> None:
        found.gpus = {"b": broken} if number == 1 else {}

    found.before = before
    assert found.run() == 0
    assert found.attempts == [{"a": 2, "b": 2}, {"a": 2}, {"a": 2, "b": 2}]
    assert said in found.timeline() and "b is back" in found.timeline()


def test_a_host_that_passes_only_alone_is_not_taken_back_twice(
    world: Callable[..., World],
) -> None:
    found = world(137, 75, 0)
    found.long = 2
    look = found.look

    def picky(hosts: Sequence[Host]) -> list[Verdict]:
        verdicts = look(hosts)
        if len(hosts) == 2 and found.attempts:
            verdicts[1].problems.append("torch differs")
        return verdicts

    found.look = picky  # type: ignore[method-assign]
    found.before = lambda number: time.sleep(0.3 if number == 3 else 0)
    assert found.run() == 0 and found.attempts[1:] == [{"a": 2}, {"a": 2}]
    assert found.timeline().count("b is back") == 1


def test_a_host_too_many_is_not_waited_for(world: Callable[..., World]) -> None:
    found = world(0)
    assert found.run(micro_batches=2) == 0 and found.attempts == [{"a": 2}]
    odd = world(0)
    assert odd.run(micro_batches=3) == 0 and odd.attempts == [{"a": 2, "b": 1}]
    assert "3 ranks on a, b; 1 slots idle, as 3 micro-batches are shared" in odd.timeline()


def test_no_host_left(world: Callable[..., World]) -> None:
    found = world(137)
    found.before = lambda number: found.down.update("ab")
    assert found.run(max_restarts=2) == 137 and len(found.attempts) == 1
    assert found.timeline().count("no host is left") == 2


def test_asked_to_stop(world: Callable[..., World]) -> None:
    found = world(75)
    found.long = 1
    found.before = lambda number: found.made.stop()
    assert found.run() == 75 and len(found.attempts) == 1
    assert "stopped as asked" in found.timeline()
