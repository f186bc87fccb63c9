"""Measures a run: speed, share of time spent waiting for data, how full and even the work is."""

import time
from collections import deque
from dataclasses import dataclass

import torch

from vlm.data import plan
from vlm.data.plan import Policy, Step

WINDOW = 50


@dataclass
class _Tick:
    seconds: float
    waited_s: float
    samples: int
    tokens: int


class Meter:
    """Averages over the last steps; nothing from before a resume is counted."""

    def __init__(self, policy: Policy, world_size: int) -> None:
        self._policy, self._world_size = policy, world_size
        self._ticks: deque[_Tick] = deque(maxlen=WINDOW)
        self._steps: deque[Step] = deque(maxlen=WINDOW)
        self._last = time.perf_counter()

    def pause(self) -> None:
        """What lies between now and the last step (an evaluation, a checkpoint) is not training."""
        self._last = time.perf_counter()

    def step(self, step: Step, waited_s: float) -> float:
        """Counts one global step; returns the seconds it took."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        samples, tokens = sum(len(b.rows) for b in step), sum(b.num_tokens for b in step)
        self._ticks.append(_Tick(seconds, waited_s, samples, tokens))
        self._steps.append(step)
        return seconds

    def values(self) -> dict[str, float | None]:
        seconds = sum(tick.seconds for tick in self._ticks)
        summary = plan.summary(self._steps, self._policy, self._world_size)
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
        return {
            "samples_per_s": self.samples_per_s,
            "tokens_per_s": sum(tick.tokens for tick in self._ticks) / seconds,
            "data_wait_frac": sum(tick.waited_s for tick in self._ticks) / seconds,
            "fill_frac": summary.fill_frac,
            "balance": summary.balance,
            "text_frac": summary.text_frac,
            "peak_memory_gb": peak,
        }

    @property
    def samples_per_s(self) -> float:
        seconds = sum(tick.seconds for tick in self._ticks)
        return sum(tick.samples for tick in self._ticks) / seconds
