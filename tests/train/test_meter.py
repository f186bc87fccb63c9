import dataclasses

import numpy as np
import pytest

from tests.data.random_rows import make_policy
from vlm.data.plan.plan import MicroBatch, Step
from vlm.train import meter
from vlm.train.meter import Meter
from vlm.train.metrics import COLUMNS

POLICY = make_policy(batching="packed", micro_batches=2, budget=100, frame_cost=0.0)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(meter.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def make_step(*tokens: int, num_text: int = 0, num_frames: int = 0) -> Step:
    """Micro-batches of two samples, without padding."""
    return tuple(
        MicroBatch(
            rows=np.arange(2),
            epochs=np.zeros(2, np.int64),
            kind="video",
            num_tokens=n,
            num_frames=num_frames,
            num_text=num_text,
            cost=float(n),
        )
        for n in tokens
    )


def test_it_measures_steps_and_nothing_between_them(clock: Clock) -> None:
    measured = Meter(POLICY, world_size=2)
    clock.now += 2
    assert measured.step(make_step(50, 50), waited_s=0.5) == 2
    clock.now += 100  # an evaluation
    measured.pause()
    clock.now += 6
    assert measured.step(make_step(90, 30, num_text=1), waited_s=1.5) == 6
    values = measured.values()
    assert values["samples_per_s"] == measured.samples_per_s == 8 / 8
    assert values["tokens_per_s"] == 220 / 8
    assert values["data_wait_frac"] == 2 / 8
    assert values["fill_frac"] == pytest.approx((0.5 + 0.5 + 0.9 + 0.3) / 4)
    assert values["balance"] == pytest.approx((1.0 + 90 / 60) / 2)
    assert values["text_frac"] == 2 / 8
    assert values["peak_memory_gb"] is None


def test_frames_and_what_they_cost(clock: Clock) -> None:
    measured = Meter(dataclasses.replace(POLICY, frame_cost=3.0), world_size=1)
    for num_frames in (4, 6):
        clock.now += 5
        measured.step(make_step(10, 20, num_frames=num_frames), waited_s=0.0)
    assert measured.values()["frames_per_s"] == (2 * 4 + 2 * 6) / 10
    assert measured.cost_per_s == (60 + 3 * 20) / 10


def test_time_that_is_paid_for_and_time_that_is_left(clock: Clock) -> None:
    measured = Meter(POLICY, world_size=1)
    for _ in range(4):
        clock.now += 2
        measured.step(make_step(10, 10), waited_s=0.0)
    clock.now += 4  # a checkpoint, which the steps that are left will need, too
    measured.pause()
    assert (measured.lap(), measured.lap()) == (12, 0)
    assert measured.left_s(6) == 12 / 4 * 6


def test_only_the_last_steps_count(clock: Clock) -> None:
    measured = Meter(POLICY, world_size=1)
    for seconds in [100] + [1] * meter.WINDOW:
        clock.now += seconds
        measured.step(make_step(10, 10), waited_s=0.0)
    assert measured.samples_per_s == 4


def test_its_columns_are_columns_of_the_metrics() -> None:
    measured = Meter(POLICY, world_size=1)
    measured.step(make_step(10, 10), waited_s=0.0)
    assert measured.values().keys() <= set(COLUMNS)
