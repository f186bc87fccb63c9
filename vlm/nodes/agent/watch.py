"""What an agent tells the launcher of its ranks: that they start and end, say, do or hang.

Not here: starting and ending them (``vlm.nodes.agent.agent``).
"""

import contextlib
import json
import os
import select
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from vlm import heartbeat
from vlm.nodes.agent import rank

#: seconds between signs of life
ALIVE_S = 5.0
#: between looks at ranks and their logs
LOOK_S = 0.2
#: for a rank to write its stacks
STACKS_S = 2.0
#: characters of a log that go to the launcher at a time
CHUNK = 2**16
#: lines of a rank that failed
NUM_LAST_LINES = 20


class Events:
    """Lines to the launcher; whoever writes first writes whole."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._lock = descriptor, threading.Lock()

    def send(self, event: str, **values: Any) -> None:
        data = json.dumps({"event": event, **values}).encode() + b"\n"
        # a launcher that is gone is noticed by the end of the input
        with self._lock, contextlib.suppress(OSError):
            while data:
                data = data[os.write(self._descriptor, data) :]


class Ranks:
    """The processes of this host's ranks, which torch's agent starts."""

    def __init__(self) -> None:
        self._own = psutil.Process()
        #: whether there ever was one
        self.seen = False

    def find(self) -> dict[int, psutil.Process]:
        """Those that run, by local rank."""
        found = {}
        for process in self._own.children():
            with contextlib.suppress(psutil.Error, KeyError, ValueError):
                found[int(process.environ()["LOCAL_RANK"])] = process
        self.seen = self.seen or bool(found)
        return found

    def signal(self, number: int) -> None:
        """To ranks alone: what they have started is theirs to stop."""
        for process in self.find().values():
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)


class Watch:
    """Looks at ranks from a thread of the agent.

    Args:
        first_rank: the number of local rank 0 in the job.
    """

    def __init__(
        self,
        ranks: Ranks,
        logs: Path,
        local: Path,
        first_rank: int,
        num_local_ranks: int,
        events: Events,
    ) -> None:
        self._ranks, self._events, self._first = ranks, events, first_rank
        self._logs, self._local, self._num = logs, local, num_local_ranks
        self._lock = threading.Lock()
        paths = [rank.log_path(logs, first_rank + own) for own in range(num_local_ranks)]
        #: bytes of each log that were told, or were there before
        self._read = [path.stat().st_size if path.exists() else 0 for path in paths]
        #: descriptor of a process -> local rank
        self._running: dict[int, int] = {}
        self._started = False
        self._beats: dict[int, heartbeat.Beat] = {}
        self._told = 0.0

    def forever(self) -> None:
        while True:
            self.look()

    def look(self) -> None:
        """Once; takes about ``LOOK_S`` while nothing happens. From any thread."""
        # an empty list waits, too; not under the lock, which others would never get
        ready = select.select(list(self._running), [], [], LOOK_S)[0]
        with self._lock:
            if not self._started:
                self._find()
            for descriptor in [found for found in ready if found in self._running]:
                local_rank, code = self._running.pop(descriptor), _exit_code(descriptor)
                lines = [] if code == 0 else self._last_lines(local_rank)
                self._events.send("ended", local_rank=local_rank, code=code, lines=lines)
            for local_rank in range(self._num):
                self._tell_log(local_rank)
                self._tell_beat(local_rank)
            if time.monotonic() - self._told > ALIVE_S:
                self._told = time.monotonic()
                self._events.send("alive")

    def tell_end(self, codes: dict[int, int]) -> None:
        """All ranks have ended.

        Args:
            codes: by local rank, of those that torch holds for failed.
        """
        self.look()
        failed = [(own, code, self._last_lines(own)) for own, code in codes.items()]
        self._events.send("done", failed=failed)

    def tell_stacks(self) -> None:
        """Of all ranks: what their threads do, and what the kernel says of them."""
        found = self._ranks.find()
        states = {local_rank: _state(process) for local_rank, process in found.items()}
        self._ranks.signal(rank.STACKS)
        time.sleep(STACKS_S)
        for local_rank, state in states.items():
            path = rank.stacks_path(self._local, self._first + local_rank)
            text = path.read_text(errors="replace")[-CHUNK:] if path.exists() else ""
            self._events.send("stacks", local_rank=local_rank, state=state, text=text)
        self._events.send("stacks_done")

    def _find(self) -> None:
        found = self._ranks.find()
        if len(found) < self._num:
            return
        self._started = True
        for local_rank, process in found.items():
            with contextlib.suppress(ProcessLookupError):
                self._running[os.pidfd_open(process.pid)] = local_rank
        pids = [found[local_rank].pid for local_rank in sorted(found)]
        self._events.send("started", pids=pids)

    def _tell_log(self, local_rank: int) -> None:
        """Whole lines that are new since the last look."""
        path = rank.log_path(self._logs, self._first + local_rank)
        try:
            with path.open("rb") as file:
                file.seek(self._read[local_rank])
                data = file.read(CHUNK)
        except OSError:  # not there yet, or storage that is away for a while
            return
        whole = data[: data.rfind(b"\n") + 1] if len(data) < CHUNK else data
        if whole:
            self._read[local_rank] += len(whole)
            lines = whole.decode("utf-8", "replace").splitlines()
            self._events.send("log", local_rank=local_rank, lines=lines, time=time.time())

    def _tell_beat(self, local_rank: int) -> None:
        beat = heartbeat.read(rank.beat_path(self._local, self._first + local_rank))
        if beat is not None and beat != self._beats.get(local_rank):
            self._beats[local_rank] = beat
            self._events.send("beat", local_rank=local_rank, beat=beat)

    def _last_lines(self, local_rank: int) -> list[str]:
        """The end of what a rank said."""
        path = rank.log_path(self._logs, self._first + local_rank)
        with contextlib.suppress(OSError), path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - CHUNK))
            return file.read().decode("utf-8", "replace").splitlines()[-NUM_LAST_LINES:]
        return []


def _exit_code(descriptor: int) -> int | None:
    """Of a child that has ended, minus the signal that killed it; None: torch was faster."""
    with contextlib.suppress(ChildProcessError):
        found = os.waitid(os.P_PIDFD, descriptor, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if found is not None:
            killed = found.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
            return -found.si_status if killed else found.si_status
    return None


def _state(process: psutil.Process) -> str:
    """``running``, ``sleeping``, ``disk-sleep``, ``stopped``; ``gone``."""
    with contextlib.suppress(psutil.Error):
        return process.status()
    return "gone"
