"""Where a job stands, as a table: hosts, ranks, steps, and how long ago each was heard.

Not here: where that is written down (``vlm.nodes.launcher.record``).
"""

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from vlm.nodes.launcher import folder
from vlm.nodes.launcher.record import TIMELINE

#: lines below the table
NUM_LINES = 8
CHUNK = 2**20


def table(state: dict[str, Any], now: float, lines: list[str]) -> Group:
    """
    Args:
        state: of ``vlm.nodes.launcher.folder.read``.
        lines: the end of the timeline.
    """
    found = Table("rank", "host", "state", "phase", "step", "heard", box=None)
    for name, rank in state["ranks"].items():
        host = state["hosts"][rank["host"]]
        shown = rank["state"] if host["state"] == "running" else host["state"]
        if "code" in rank:
            shown = f"ended {rank['code']}"
        heard = _ago(now, rank.get("beat"))
        place = (rank.get("phase", ""), str(rank.get("step", "")))
        found.add_row(name, Text(rank["host"]), shown, Text(place[0]), place[1], heard)
    for name, host in state["hosts"].items():
        if not host["ranks"]:
            found.add_row("-", Text(name), host["state"], "", "", "")
    title = Text(summary(state, now), style="bold")
    return Group(title, found, *(Text(line, style="dim", no_wrap=True) for line in lines))


def summary(state: dict[str, Any], now: float) -> str:
    """One line."""
    phase = state["phase"]
    if phase == "ended":
        phase = f"ended with {state['exit_code']}"
    elif not folder.alive(state):
        phase = "its launcher is gone, and so are its ranks"
    steps = [rank["step"] for rank in state["ranks"].values() if "step" in rank]
    parts = [phase, f"attempt {state['attempt']}", f"{state['num_failures']} restarts"]
    parts.append(f"{state['num_preemptions']} preemptions")
    if steps:
        parts.append(f"step {min(steps)}")
    if state["median_step_s"] is not None:
        parts.append(f"{state['median_step_s']:.3g} s a step")
    begun = _ago(state.get("ended", now), state["started"])
    return f"{state['name']}: {', '.join(parts)}, for {begun}"


def _ago(now: float, when: float | None) -> str:
    if when is None:
        return ""
    seconds = max(0, int(now - when))
    if seconds < 100:
        return f"{seconds} s"
    return f"{seconds // 60} min" if seconds < 6000 else f"{seconds // 3600} h"


class Timeline:
    """Its lines as they come."""

    def __init__(self, job: Path) -> None:
        self._path, self._at = job / TIMELINE, 0
        self.last: deque[str] = deque(maxlen=NUM_LINES)

    def skip(self) -> None:
        """To the end but for the last lines."""
        size = self._path.stat().st_size if self._path.exists() else 0
        self._at = max(0, size - CHUNK)
        for _ in self.new():
            continue

    def new(self) -> Iterator[str]:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._at)
            while data := file.read(CHUNK):
                whole = data[: data.rfind(b"\n") + 1]
                if not whole:
                    return
                self._at += len(whole)
                file.seek(self._at)
                for line in whole.decode("utf-8", "replace").splitlines():
                    self.last.append(line)
                    yield line
