import io
from pathlib import Path

from rich.console import Console

from vlm.heartbeat import Beat
from vlm.nodes.hosts.hostfile import Host
from vlm.nodes.launcher import folder, status
from vlm.nodes.launcher.connection import Place
from vlm.nodes.launcher.record import Record
from vlm.nodes.launcher.status import Timeline


def show(job: Path) -> str:
    timeline = Timeline(job)
    timeline.skip()
    out, state = io.StringIO(), folder.read(job)
    for rank in state["ranks"].values():
        if "beat" in rank:
            rank["beat"] = state["started"] + 60
    found = status.table(state, state["started"] + 67, list(timeline.last))
    Console(file=out, width=120, highlight=False).print(found)
    return out.getvalue()


def test_a_job_as_it_goes(tmp_path: Path) -> None:
    record = Record(tmp_path, "job", [])
    record.write()
    assert "job: preflight, attempt 0" in show(tmp_path)
    places = [Place(Host("a", 1), 1, "a", "lo"), Place(Host("b", 1), 1, "b", "lo")]
    record.begin(1, places, ["c"])
    for index in (0, 1):
        record.event(index, {"event": "started", "pids": [7]})
        beat = Beat("train", 41 + index, 0.0)
        record.event(index, {"event": "beat", "rank": index, "beat": beat})
    record.event(1, {"event": "log", "rank": 1, "lines": ["[bold]said"]})
    record.state["median_step_s"] = 0.5
    record.write()
    text = show(tmp_path)
    assert "running, attempt 1, 0 restarts, 0 preemptions, step 41, 0.5 s a step, for 67 s" in text
    assert [line.split() for line in text.splitlines()[2:5]] == [
        ["0", "a", "running", "train", "41", "7", "s"],
        ["1", "b", "running", "train", "42", "7", "s"],
        ["-", "c", "not", "used"],
    ]
    assert "b rank 1 | [bold]said" in text
    record.event(0, {"event": "closed", "reason": "refused"})
    record.finish(1)
    text = show(tmp_path)
    assert "ended with 1" in text and "lost" in text


def test_a_launcher_that_was_killed(tmp_path: Path) -> None:
    record = Record(tmp_path, "job", [])
    record.state["created"] -= 60
    record.write()
    assert "its launcher is gone" in show(tmp_path)


def test_lines_come_once_and_whole(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path)
    assert list(timeline.new()) == []
    path = tmp_path / "timeline.log"
    path.write_text("one\ntwo\nthr")
    assert list(timeline.new()) == ["one", "two"]
    path.write_text("one\ntwo\nthree\n")
    assert list(timeline.new()) == ["three"] and list(timeline.new()) == []
