"""What a launcher writes down: the timeline of all ranks, and where the job stands.

``timeline.log`` has a line for each thing said anywhere, with host and rank, in the order in which
it was heard; ``state.json`` is replaced when something changes, and ``vlm.nodes.launcher.status``
shows it. Nothing secret gets into either. Not here: the log of each rank, which its host writes.
"""

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from vlm.errors import EXIT_PREEMPTED, one_line
from vlm.nodes.agent.environment import hide
from vlm.nodes.launcher.connection import Place, first_ranks
from vlm.nodes.launcher.hang import Stack
from vlm.nodes.launcher.outcome import Outcome

log = logging.getLogger(__name__)

STATE, TIMELINE, LOGS, STACKS = "state.json", "timeline.log", "logs", "stacks"
#: state is written at most this often
EVERY_S = 1.0
#: characters of a line
MAX_LINE = 4000


class Record:
    """Of one launcher, in the job's folder.

    Args:
        hidden: values that must not be shown.
    """

    def __init__(self, folder: Path, name: str, hidden: Sequence[str]) -> None:
        self._folder, self._hidden = folder, hidden
        path = folder / TIMELINE
        torn = _torn(path)
        self._timeline = path.open("a", encoding="utf-8", buffering=1)
        if torn:
            self._timeline.write("\n")
        self._places: Sequence[Place] = ()
        self._written = 0.0
        self.state: dict[str, Any] = {
            "name": name,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "created": psutil.Process().create_time(),
            "started": time.time(),
            "phase": "preflight",
            "attempt": 0,
            "num_failures": 0,
            "num_preemptions": 0,
            "hosts": {},
            "ranks": {},
            "median_step_s": None,
            "last": "",
            "exit_code": None,
        }

    def say(self, text: str) -> None:
        """Of the launcher itself: to the console and the timeline."""
        shown = self._clean(text)
        log.info("%s", shown)
        self.state["last"] = shown
        self._line("launcher", shown)
        self.write()

    def begin(self, attempt: int, places: Sequence[Place], spare: Sequence[str]) -> None:
        self._places = places
        hosts = {
            place.host.name: {"state": "starting", "ranks": place.num_ranks, "heard": time.time()}
            for place in places
        }
        hosts |= {name: {"state": "not used", "ranks": 0, "heard": None} for name in spare}
        ranks = {}
        for place, first in zip(places, first_ranks(places), strict=True):
            for local in range(place.num_ranks):
                ranks[str(first + local)] = {"host": place.host.name, "state": "starting"}
        self.state |= {"phase": "running", "attempt": attempt, "hosts": hosts, "ranks": ranks}
        self.write()

    def event(self, index: int, event: dict[str, Any]) -> None:
        """Of a host."""
        kind, name = event["event"], self._places[index].host.name
        host = self.state["hosts"][name]
        host["heard"] = time.time()
        rank = self.state["ranks"].get(str(event["rank"]), {}) if "rank" in event else {}
        if kind == "log":
            for line in event["lines"]:
                self._line(f"{name} rank {event['rank']}", self._clean(line))
        elif kind == "started":
            host["state"] = "running"
            for local, pid in enumerate(event["pids"]):
                first = first_ranks(self._places)[index]
                self.state["ranks"][str(first + local)] |= {"state": "running", "pid": pid}
            self._line(name, f"started processes {event['pids']}")
        elif kind == "beat":
            beat = event["beat"]
            rank |= {"phase": beat.phase, "step": beat.step, "beat": time.time()}
        elif kind == "ended":
            rank |= {"state": "ended", "code": event["code"]}
            self._line(f"{name} rank {event['rank']}", f"ended with {event['code']}")
        elif kind == "done":
            host["state"] = "ended"
        elif kind == "closed":
            if host["state"] != "ended":
                host["state"] = "lost"
                self._line(name, f"lost: {self._clean(event['reason'])}")
        if time.monotonic() - self._written > EVERY_S:
            self.write()

    def end(self, outcome: Outcome, stacks: dict[int, Stack]) -> None:
        """Of an attempt: names what failed first, with its last lines."""
        self._save_stacks(stacks)
        fault = outcome.fault
        if fault is None:
            return
        host = "all hosts" if fault.host is None else f"host {fault.host}"
        who = host if fault.rank is None else f"rank {fault.rank} on {fault.host}"
        what = "first to leave" if outcome.code == EXIT_PREEMPTED else "first failure"
        self.say(f"{what}: {who}: {fault.reason}")
        for line in fault.lines:
            log.info("    %s", self._clean(line))
        if stacks:
            self.say(f"stacks of all ranks: {self._folder / STACKS}")

    def _save_stacks(self, stacks: dict[int, Stack]) -> None:
        folder = self._folder / STACKS / f"attempt_{self.state['attempt']:03d}"
        try:
            for rank, stack in sorted(stacks.items()):
                folder.mkdir(parents=True, exist_ok=True)
                text = self._hide(f"process: {stack.state}\n\n{stack.text}")
                (folder / f"rank_{rank:05d}.txt").write_text(text, encoding="utf-8")
        except OSError as error:
            self.say(f"stacks could not be saved: {error}")

    def finish(self, code: int) -> None:
        self.state |= {"phase": "ended", "exit_code": code, "ended": time.time()}
        self.write()
        self._timeline.close()

    def write(self) -> None:
        self._written = time.monotonic()
        path = self._folder / STATE
        # a full disk must not end the job; its ranks have a say of their own on that
        with contextlib.suppress(OSError):
            aside = path.with_suffix(".tmp")
            aside.write_text(json.dumps(self.state), encoding="utf-8")
            os.replace(aside, path)

    def _line(self, who: str, text: str) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
        with contextlib.suppress(OSError):
            self._timeline.write(f"{now} {who} | {text}\n")

    def _clean(self, text: str) -> str:
        return self._hide(one_line(text))[:MAX_LINE]

    def _hide(self, text: str) -> str:
        return hide(text, self._hidden)


def _torn(path: Path) -> bool:
    """Whether its last line has no end: the disk was full."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
