"""Measures a run: speed, share of time spent waiting for data, how full and even the work is.

Not here: what the numbers are compared with (``vlm.train.health``).
"""

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch

from vlm.data.plan import plan
from vlm.data.plan.plan import MicroBatch, Policy, Step

#: steps that are averaged over
WINDOW = 50


class _Tick(NamedTuple):
    seconds: float
    waited_s: float
    step: Step


def real_cost(step: Step, policy: Policy) -> float:
    """What the samples of a step cost in tokens, without padding."""
    return sum(batch.num_tokens + policy.frame_cost * batch.num_frames for batch in step)


class Meter:
    """Averages over the last steps; nothing from before a resume is counted."""

    def __init__(self, policy: Policy, world_size: int) -> None:
        self._policy, self._world_size = policy, world_size
        self._ticks: deque[_Tick] = deque(maxlen=WINDOW)
        self._last = self._started = self._lap = time.perf_counter()
        #: since the start of the process, or the last rollback
        self.num_steps = 0

    def pause(self) -> None:
        """What lies between now and the last step (an evaluation, a checkpoint) is not training."""
        self._last = time.perf_counter()

    def step(self, step: Step, waited_s: float) -> float:
        """Counts one global step; returns the seconds it took."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._ticks.append(_Tick(seconds, waited_s, step))
        self.num_steps += 1
        return seconds

    def lap(self) -> float:
        """Seconds since the last lap, of training or not: what is paid for."""
        now = time.perf_counter()
        seconds, self._lap = now - self._lap, now
        return seconds

    def left_s(self, num_steps: int) -> float:
        """Seconds for so many more steps, evaluations and checkpoints as they came so far."""
        return (time.perf_counter() - self._started) / self.num_steps * num_steps

    def values(self) -> dict[str, float | None]:
        steps = [tick.step for tick in self._ticks]
        summary = plan.summary(steps, self._policy, self._world_size)
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
        return {
            "samples_per_s": self.samples_per_s,
            "tokens_per_s": self._per_s(lambda batch: batch.num_tokens),
            "frames_per_s": self._per_s(lambda batch: batch.num_frames),
            "data_wait_frac": self.data_wait_frac,
            "fill_frac": summary.fill_frac,
            "balance": summary.balance,
            "text_frac": summary.text_frac,
            "peak_memory_gb": peak,
        }

    @property
    def cost_per_s(self) -> float:
        """Of the samples, without padding."""
        return sum(real_cost(tick.step, self._policy) for tick in self._ticks) / self._seconds

    @property
    def samples_per_s(self) -> float:
        return self._per_s(lambda batch: len(batch.rows))

    @property
    def data_wait_frac(self) -> float:
        return sum(tick.waited_s for tick in self._ticks) / self._seconds

    def _per_s(self, count: Callable[[MicroBatch], int]) -> float:
        return sum(count(batch) for tick in self._ticks for batch in tick.step) / self._seconds

    @property
    def _seconds(self) -> float:
        return sum(tick.seconds for tick in self._ticks)
