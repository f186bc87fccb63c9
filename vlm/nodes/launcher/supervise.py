"""The launcher's side of a job: starts an agent on every host and watches them all.

One attempt ends when all ranks have ended. What fails first is named, everybody else is told at
once, and after a grace nothing is left. Not here: the host's side (``vlm.nodes.agent.agent``),
whether to try again (``vlm.nodes.launcher.restart``).
"""

import contextlib
import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vlm.heartbeat import Beat
from vlm.nodes.agent.watch import ALIVE_S, NUM_LAST_LINES
from vlm.nodes.launcher import hang
from vlm.nodes.launcher.connection import Connection, Job, Place, first_ranks
from vlm.nodes.launcher.outcome import Outcome, Tally

#: beyond the grace, until connections are cut
EXTRA_S = 10.0
#: for stacks to come in; a hang leaves no checkpoint, so there is nothing to be patient for
STACKS_S, HANG_GRACE_S = 10.0, 2.0
TICK_S = 0.2

#: told of (place index, event)
Listener = Callable[[int, dict[str, Any]], None]


@dataclass
class _Hang:
    """Being looked at."""

    silent_s: float
    since: float
    #: hosts that have not said all
    awaited: set[int]


class Attempt:
    """The agents of one start.

    Args:
        tell: called with every event, from one thread.
    """

    def __init__(
        self, job: Job, places: Sequence[Place], port: int, run_id: str, tell: Listener
    ) -> None:
        self._job, self._places, self._tell = job, places, tell
        self._events: queue.Queue[tuple[int, dict[str, Any]]] = queue.Queue()
        self._first_ranks = first_ranks(places)
        self._pulse = hang.Pulse(sum(place.num_ranks for place in places), job.hang_s)
        self._tally = Tally(places)
        self._stacks: dict[int, hang.Stack] = {}
        self._lines: dict[int, deque[str]] = {}
        self._hang: _Hang | None = None
        self._grace_s = job.grace_s
        #: when all were told to stop
        self._stopped_at: float | None = None
        #: set by a signal handler, so no lock
        self._stop_asked = False
        self._connections = [
            Connection(job, places, index, port, run_id, self._events)
            for index in range(len(places))
        ]
        self._open = set(range(len(places)))
        self._heard = [time.monotonic()] * len(places)

    def stop(self) -> None:
        """Asks all ranks to save and leave. From any thread or signal handler."""
        self._stop_asked = True

    @property
    def stacks(self) -> dict[int, hang.Stack]:
        """By rank, of a job that hung."""
        return self._stacks

    @property
    def median_step_s(self) -> float | None:
        return self._pulse.median_s

    def wait(self) -> Outcome:
        """Returns when every connection has ended."""
        pinged = 0.0
        while self._open:
            with contextlib.suppress(queue.Empty):
                index, event = self._events.get(timeout=TICK_S)
                self._take(index, event)
            now = time.monotonic()
            if self._stop_asked and self._stopped_at is None:
                self._stop_all(now)
            if now - pinged > ALIVE_S:
                pinged = now
                for index in list(self._open):
                    self._connections[index].send({})
            self._look_for_a_hang(now)
            self._cut(now)
        return self._tally.outcome()

    def _take(self, index: int, event: dict[str, Any]) -> None:
        now, kind = time.monotonic(), event["event"]
        self._heard[index] = now
        if "local_rank" in event:
            event["rank"] = self._first_ranks[index] + event["local_rank"]
        if kind == "beat":
            phase, step, when, shards = event["beat"]
            event["beat"] = Beat(phase, step, when, tuple(shards))
            self._pulse.hear(event["rank"], event["beat"], now)
        elif kind == "log":
            said = self._lines.setdefault(event["rank"], deque(maxlen=NUM_LAST_LINES))
            said.extend(event["lines"])
        elif kind == "stacks":
            self._stacks[event["rank"]] = hang.Stack(event["state"], event["text"])
        elif kind == "stacks_done" and self._hang is not None:
            self._hang.awaited.discard(index)
        elif kind == "ended":
            self._tally.ended(index, event["rank"], event["code"], event["lines"])
        elif kind == "fault":
            self._tally.lose(index, event["text"])
        elif kind == "done":
            first = self._first_ranks[index]
            self._tally.done(index, [(first + own, *rest) for own, *rest in event["failed"]])
        elif kind == "closed":
            self._open.discard(index)
            self._tally.lose(index, event["reason"])
        self._tell(index, event)
        if self._tally.failed and self._stopped_at is None:
            self._stop_all(now)

    def _look_for_a_hang(self, now: float) -> None:
        if self._stopped_at is not None:
            return
        if self._hang is None:
            silent = self._pulse.silent_s(now)
            if silent is not None:
                self._hang = _Hang(silent, now, set(self._open))
                for index in self._open:
                    self._connections[index].send({"stacks": True})
        elif not self._hang.awaited & self._open or now - self._hang.since > STACKS_S:
            rank, why = hang.blame(self._pulse.beats, self._stacks)
            median = self._pulse.median_s
            usual = "" if median is None else f" (the median step takes {median:.3g} s)"
            who = (
                ""
                if rank is None
                else f"rank {rank} {hang.describe(self._pulse.beats.get(rank))}: "
            )
            reason = f"no step for {self._hang.silent_s:.0f} s{usual}; {who}{why}"
            self._tally.hung(rank, reason, self._lines.get(0 if rank is None else rank, ()))
            self._grace_s = min(self._grace_s, HANG_GRACE_S)
            self._stop_all(now)

    def _stop_all(self, now: float) -> None:
        self._stopped_at = now
        for index in self._open:
            self._connections[index].send({"stop": self._grace_s})

    def _cut(self, now: float) -> None:
        """Ends connections: to hosts that fell silent, and to all after the grace."""
        for index in list(self._open):
            if now - self._heard[index] > self._job.silence_s:
                self._tally.lose(index, f"nothing was heard for {self._job.silence_s:.0f} s")
                self._connections[index].kill()
            if self._stopped_at is None:
                continue
            late = now - self._stopped_at - self._grace_s
            if late > EXTRA_S:
                self._connections[index].close()  # the agent kills what is left
            if late > 2 * EXTRA_S + self._job.grace_s:
                self._tally.lose(index, "its processes could not be ended")
                self._connections[index].kill()
