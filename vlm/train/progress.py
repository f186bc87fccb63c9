"""Shows how far training is: a bar on a terminal, a plain line now and then in a log file.

Only rank 0 shows anything. Not here: the record of the numbers (``vlm.train.metrics``).
"""

import logging
import math
import sys
from collections import deque
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

from vlm import dist

log = logging.getLogger(__name__)

LINE_EVERY_S = 30.0
#: the time left follows the speed of this many last updates, so that a slow start is forgotten
SPEED_WINDOW = 50


class Progress:
    """``with Progress(total, step=resumed) as progress: progress.update(step, ...)``."""

    def __init__(self, total: int, *, step: int = 0) -> None:
        self.total = total
        self._times = deque([(monotonic(), step)], maxlen=SPEED_WINDOW)
        self._line_at = -math.inf
        self._bar: RichProgress | None = None
        self._task = TaskID(0)
        self._handlers: list[logging.StreamHandler] = []
        self._stderr = sys.stderr
        self._is_main = dist.is_main()
        console = Console(stderr=True)
        # Not console.is_terminal: FORCE_COLOR sets that in CI, where a bar fills the log.
        if self._is_main and sys.stderr.isatty() and not console.is_dumb_terminal:
            self._bar = _bar(console)
            self._task = self._bar.add_task("train", total=total, completed=step, note="")

    def update(
        self, step: int, *, loss: float | None = None, samples_per_s: float | None = None
    ) -> None:
        """``step`` global steps are done."""
        if not self._is_main:
            return
        now = monotonic()
        self._times.append((now, step))
        note = self._note(loss, samples_per_s)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note)
        elif step >= self.total or now - self._line_at >= LINE_EVERY_S:
            self._line_at = now
            log.info("step %d/%d  %s", step, self.total, note)

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._stderr = sys.stderr
            self._bar.start()
            # rich has put itself in front of sys.stderr; a handler that still holds the real one
            # would write through the bar.
            for handler in logging.getLogger("vlm").handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream is self._stderr:
                    handler.setStream(sys.stderr)
                    self._handlers.append(handler)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            for handler in self._handlers:
                handler.setStream(self._stderr)
            self._handlers.clear()

    def _note(self, loss: float | None, samples_per_s: float | None) -> str:
        parts = []
        if loss is not None:
            parts.append(f"loss {loss:.4f}")
        if samples_per_s is not None:
            parts.append(f"{samples_per_s:.1f} samples/s")
        parts.append(f"{format_s(self._left_s())} left")
        return "  ".join(parts)

    def _left_s(self) -> float | None:
        (start, first), (now, last) = self._times[0], self._times[-1]
        if last <= first:
            return None
        return max(self.total - last, 0) * (now - start) / (last - first)


def _bar(console: Console) -> RichProgress:
    # Twice a second: the refresh thread shares the interpreter with the decoding threads.
    return RichProgress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        refresh_per_second=2,
    )


def format_s(seconds: float | None) -> str:
    """A duration as people say it: ``42s``, ``3m05s``, ``2h07m``, ``3d04h``; ``?`` if unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02d}h"
    if hours:
        return f"{hours}h{m:02d}m"
    return f"{minutes}m{s:02d}s" if minutes else f"{s}s"
