"""Wall and CPU seconds of one thread."""

import time
from typing import NamedTuple


class Clock(NamedTuple):
    wall: float
    cpu: float

    @classmethod
    def now(cls) -> "Clock":
        return cls(time.perf_counter(), time.thread_time())

    def since(self) -> "Clock":
        """What has passed since then, in the same thread."""
        now = self.now()
        return Clock(now.wall - self.wall, now.cpu - self.cpu)
