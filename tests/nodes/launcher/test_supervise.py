"""Agents on real ssh servers: what is heard of them, and that they leave nothing behind."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.nodes import sshd
from tests.nodes.jobs import AWKWARD, ROOT, SECRET, Started, lives, pids
from tests.nodes.sshd import Nodes
from tests.waiting import wait_for
from vlm.nodes.hosts.hostfile import to_text
from vlm.nodes.launcher.outcome import Outcome


def test_success_and_what_ranks_say(pair: Nodes, tmp_path: Path) -> None:
    started = Started(pair, tmp_path, {"children": 1, "beats": 3}, 0.5)
    assert started.wait() == Outcome(0, None, frozenset())
    for rank in range(4):
        text = (tmp_path / f"logs/rank_{rank:05d}.log").read_text()
        expected = f"rank {rank} says {json.dumps(AWKWARD)} {SECRET}\n4 {rank % 2} None\n"
        assert text == expected
    told = {e["rank"]: e["lines"][0] for _, e in reversed(started.events) if e["event"] == "log"}
    assert sorted(told) == [0, 1, 2, 3] and told[3].startswith("rank 3 says")
    beats = {e["rank"]: e["beat"] for _, e in started.events if e["event"] == "beat"}
    assert sorted(beats) == [0, 1, 2, 3] and beats[2].shards == ("/data/a.tar",)


def test_the_first_failure_is_named_and_its_code_returned(pair: Nodes, tmp_path: Path) -> None:
    begun = time.monotonic()
    codes = {"stubborn": 1, "children": 1, "3": -9}
    outcome = Started(pair, tmp_path, codes, 120.0, grace_s=1.0).wait()
    assert outcome.code == 137 and outcome.lost == frozenset()
    assert outcome.fault is not None
    assert (outcome.fault.host, outcome.fault.rank) == ("127.0.0.3", 3)
    assert outcome.fault.lines[0].startswith("rank 3 says")
    assert outcome.fault.reason == "was killed by SIGKILL"
    assert time.monotonic() - begun < 60


@pytest.mark.slow
def test_asked_to_stop_all_ranks_leave_by_themselves(pair: Nodes, tmp_path: Path) -> None:
    started = Started(pair, tmp_path, {"saves": 1}, 120.0)
    waiting = threading.Thread(target=lambda: (started.wait_for_ranks(), started.attempt.stop()))
    waiting.start()
    assert started.wait().code == 75


@pytest.mark.slow
def test_a_host_that_goes_down(tmp_path: Path) -> None:
    with sshd.nodes(tmp_path / "ssh", 2) as own:
        started = Started(own, tmp_path, {}, 300.0)
        waiting = threading.Thread(target=lambda: (started.wait_for_ranks(), go_down(own, 1)))
        waiting.start()
        outcome = started.wait()
    assert outcome.lost == {"127.0.0.3"} and outcome.code == 1
    assert outcome.fault is not None and outcome.fault.rank is None


def go_down(nodes: Nodes, index: int) -> None:
    """The server and the connections that it has forked."""
    server = psutil.Process(nodes.nodes[index].server.pid)
    connections = server.children(recursive=True)
    nodes.nodes[index].stop()
    for process in connections:
        if process.is_running() and process.name().startswith("sshd"):
            process.kill()


@pytest.mark.slow
def test_a_killed_agent_takes_its_ranks_along(pair: Nodes, tmp_path: Path) -> None:
    started = Started(pair, tmp_path, {"stubborn": 1}, 300.0, grace_s=1.0)

    def kill() -> None:
        started.wait_for_ranks()
        rank = psutil.Process(int((tmp_path / "pid_2").read_text()))
        agent = rank.parent()
        assert agent is not None
        agent.kill()

    threading.Thread(target=kill).start()
    outcome = started.wait()
    assert outcome.lost == {"127.0.0.3"} and outcome.code == 1


@pytest.mark.slow
def test_a_hang_names_the_rank_that_is_stopped(pair: Nodes, tmp_path: Path) -> None:
    started = Started(pair, tmp_path, {"stubborn": 1, "beats": 8}, 300.0, hang_s=6.0)

    def freeze() -> None:
        started.wait_for_beats()
        os.kill(int((tmp_path / "pid_1").read_text()), signal.SIGSTOP)

    threading.Thread(target=freeze).start()
    outcome = started.wait()
    assert outcome.hung and outcome.code == 1 and outcome.fault is not None
    assert outcome.fault.rank == 1 and "is stopped" in outcome.fault.reason
    assert "of step " in outcome.fault.reason and "/data/a.tar" in outcome.fault.reason
    stacks = started.attempt.stacks
    assert sorted(stacks) == [0, 1, 2, 3] and "program.py" in stacks[0].text


@pytest.mark.slow
def test_a_silent_host_is_lost_and_swept_when_it_is_back(pair: Nodes, tmp_path: Path) -> None:
    started = Started(pair, tmp_path, {"stubborn": 1}, 300.0, grace_s=1.0, silence_s=8.0)
    frozen = []

    def freeze() -> None:
        started.wait_for_ranks()
        agent = psutil.Process(int((tmp_path / "pid_2").read_text())).parent()
        assert agent is not None
        frozen.append(agent)
        agent.suspend()

    threading.Thread(target=freeze).start()
    outcome = started.attempt.wait()
    assert outcome.lost == {"127.0.0.3"} and "nothing was heard for 8 s" in str(outcome.fault)
    left = [pid for pid in pids(tmp_path) if lives(pid)]
    assert len(left) == 2 and frozen[0].status() == psutil.STATUS_STOPPED
    for path in tmp_path.glob("pid_*"):
        path.unlink()
    assert Started(pair, tmp_path, {}, 0.1).wait().code == 0
    assert not [pid for pid in [*left, frozen[0].pid] if lives(pid)]


LAUNCHER = """
import sys
from pathlib import Path
from tests.nodes.jobs import Started
from tests.nodes.sshd import Node, Nodes
from vlm.nodes.hosts.hostfile import parse
hosts = parse(sys.argv[3], "given")
nodes = Nodes(Path(sys.argv[1]), [Node(host, None, Path()) for host in hosts])
Started(nodes, Path(sys.argv[2]), {"children": 1}, 300.0).attempt.wait()
"""


@pytest.mark.slow
def test_a_launcher_that_is_killed_leaves_nothing(pair: Nodes, tmp_path: Path) -> None:
    argv = [sys.executable, "-c", LAUNCHER, pair.folder, tmp_path, to_text(pair.hosts)]
    launcher = subprocess.Popen(argv, cwd=ROOT)
    wait_for(lambda: len(pids(tmp_path)) == 8 and all(pids(tmp_path)))
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not any(lives(pid) for pid in pids(tmp_path)), 30)
