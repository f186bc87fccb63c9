"""Stopping in time: a signal to any rank, or a time limit, and all ranks save and leave together.

The handlers only note that a signal came. At each boundary (a training or evaluation step) ranks
tell each other through an all-reduce in host memory that is awaited one boundary later, so that
nobody ever waits for it. Not here: saving (``vlm.ckpt.save``), and who sends signals.
"""

import logging
import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

from vlm import dist

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
LIMIT = "train.max_hours is over"
ORPHANED = "the deepspeed launcher is gone"
REASONS = (*(number.name for number in SIGNALS), LIMIT, ORPHANED)


class Preemption:
    """``with Preemption(max_hours) as preemption: ... if preemption.agreed(): save and leave``.

    Args:
        max_hours: from now on; None: no limit.
    """

    def __init__(self, max_hours: float | None = None) -> None:
        self._stop_at = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self._caught: set[int] = set()
        self._before: dict[signal.Signals, Any] = {}
        self._launcher = _launcher()
        self._vote: dist.Vote | None = None
        #: why all ranks stop, once they have agreed
        self.reason: str | None = None

    def agreed(self, *, now: bool = False) -> str | None:
        """Why all ranks stop here, or None. All ranks call it at the same boundaries.

        Args:
            now: waits for what ranks say at this boundary; otherwise they learn it at the next.
        """
        self._vote = self._vote or dist.Vote()
        if self._vote.pending:
            self._note(self._vote.wait())
        self._vote.start(self._flags())
        if now:
            self._note(self._vote.wait())
        return self.reason

    def _note(self, flags: list[int]) -> None:
        raised = [reason for reason, flag in zip(REASONS, flags, strict=True) if flag]
        if raised and self.reason is None:
            self.reason = raised[0]
            log.warning("stopping at the next step: %s", self.reason)

    def _flags(self) -> list[int]:
        over = self._stop_at is not None and time.monotonic() >= self._stop_at
        orphaned = self._launcher is not None and _launcher() != self._launcher
        return [*(int(number in self._caught) for number in SIGNALS), int(over), int(orphaned)]

    def __enter__(self) -> "Preemption":
        self._before = {number: signal.signal(number, self._catch) for number in SIGNALS}
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._vote is not None and error is None:  # else another rank may be gone
            if self._vote.pending:
                self._vote.wait()
            self._vote.close()

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self._caught.add(number)


def _launcher() -> tuple[int, int] | None:
    """Pids of the process that started this rank and of ``deepspeed`` above it; None without it.

    ``deepspeed`` forwards no signal: killed, it leaves ranks behind that nobody watches or stops.
    """
    if "CROSS_RANK" not in os.environ:  # only DeepSpeed's launcher sets it
        return None
    parent = os.getppid()
    try:
        stat = Path(f"/proc/{parent}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # it is gone, or this is no Linux
        return parent, 0
    return parent, int(stat.rpartition(")")[2].split()[1])
