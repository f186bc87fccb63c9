"""Who waits for which shard, since when: what the loader's watchdog says when no batch comes.

Not here: the watchdog's clock, which is the loader's (``vlm.data.load.loader``).
"""

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Waits:
    """Reads that have begun and not ended; safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._open: dict[int, tuple[float, str]] = {}

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Marks the time in the block as spent on ``what``."""
        number = next(self._numbers)
        with self._lock:
            self._open[number] = (time.monotonic(), what)
        try:
            yield
        finally:
            with self._lock:
                del self._open[number]

    def describe(self) -> str:
        """The longest wait of all, and how many more there are."""
        with self._lock:
            waiting = sorted(self._open.values())
        if not waiting:
            return "no shard: the model's process is busy with samples it has read"
        since, what = waiting[0]
        more = f" (and {len(waiting) - 1} more reads)" if len(waiting) > 1 else ""
        return f"{what}, for {time.monotonic() - since:.0f} s{more}"

    def num_hanging(self, seconds: float) -> int:
        """Reads that have taken longer than ``seconds`` so far."""
        now = time.monotonic()
        with self._lock:
            return sum(now - since > seconds for since, _ in self._open.values())
