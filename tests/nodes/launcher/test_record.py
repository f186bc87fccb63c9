import json
from pathlib import Path

from vlm.heartbeat import Beat
from vlm.nodes.hosts.hostfile import Host
from vlm.nodes.launcher.connection import Place
from vlm.nodes.launcher.hang import Stack
from vlm.nodes.launcher.outcome import Fault, Outcome
from vlm.nodes.launcher.record import Record

PLACES = [Place(Host("a", 1), 1, "a", "lo"), Place(Host("b", 2), 2, "b", "lo")]


def test_the_timeline_and_the_state(tmp_path: Path) -> None:
    record = Record(tmp_path, "job", ["s3cret"])
    record.begin(2, PLACES, ["c"])
    record.event(1, {"event": "started", "pids": [11, 12]})
    record.event(1, {"event": "beat", "rank": 2, "beat": Beat("train", 9, 0.0, ("a.tar",))})
    record.event(1, {"event": "log", "rank": 1, "lines": ["hello s3cret", "\x1b[2Jx\ty"]})
    record.event(1, {"event": "ended", "rank": 2, "code": 3})
    record.event(0, {"event": "closed", "reason": "refused"})
    fault = Fault("b", 2, "ended with code 3", ("last s3cret words",))
    record.end(Outcome(3, fault, frozenset({"a"})), {0: Stack("stopped", "s3cret frame")})
    record.finish(3)
    text = (tmp_path / "timeline.log").read_text()
    assert "b rank 1 | hello ***\n" in text and "b rank 1 | \\x1b[2Jx y\n" in text
    assert "a | lost: refused" in text and "launcher | first failure: rank 2 on b: ended" in text
    assert all(line[:4].isdigit() and line[23] == " " for line in text.splitlines())
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["exit_code"] == 3 and state["attempt"] == 2 and state["phase"] == "ended"
    assert [host["state"] for host in state["hosts"].values()] == ["lost", "running", "not used"]
    assert state["ranks"]["2"] | {"beat": 0} == {
        **{"host": "b", "state": "ended", "pid": 12, "phase": "train", "step": 9, "beat": 0},
        "code": 3,
    }
    assert (tmp_path / "stacks/attempt_002/rank_00000.txt").read_text().endswith("*** frame")
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and "s3cret" in p.read_text()]


def test_a_hang_that_is_nobodys_fault(tmp_path: Path) -> None:
    record = Record(tmp_path, "job", [])
    record.begin(1, PLACES, [])
    record.end(Outcome(1, Fault(None, None, "no step for 300 s"), frozenset(), hung=True), {})
    text = (tmp_path / "timeline.log").read_text()
    assert "launcher | first failure: all hosts: no step for 300 s\n" in text


def test_a_torn_line_gets_its_end(tmp_path: Path) -> None:
    (tmp_path / "timeline.log").write_text("half a li")
    for text in ("one", "two"):
        Record(tmp_path, "job", []).say(text)
    lines = (tmp_path / "timeline.log").read_text().splitlines()
    assert lines[0] == "half a li" and [line[-3:] for line in lines[1:]] == ["one", "two"]
