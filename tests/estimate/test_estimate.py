"""Sums, time and money of an estimate. Its parts are held to real passes in their own tests."""

from pathlib import Path

import pytest

from tests.train import helpers
from tests.train.families import FAMILIES, PROJECTED
from vlm.estimate.estimate import Estimate, estimate
from vlm.estimate.fits import RESERVED, Hardware
from vlm.gpus import Gpu


def run(folder: Path, *overrides: str) -> Estimate:
    recipe = helpers.recipe(folder, *overrides)
    config = {**helpers.resolved(2, 2), "bf16": {"enabled": True}}
    config["zero_optimization"] |= {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000}
    hardware = Hardware(Gpu(1e12, 80.0), 1, 2, 0.5, 3.0)
    return estimate(recipe, config, 300, hardware)


def test_sums_time_and_money(tmp_path: Path) -> None:
    found = run(tmp_path)
    assert list(found.fits) == [
        *("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
    ]
    assert found.chosen == "zero2" and found.advice == "zero2 fits"
    fit = found.fits["zero2"]
    parts = fit.weights + fit.gradients + fit.optimizer + fit.buckets
    parts += fit.activations + fit.logits + fit.frames
    assert fit.total == parts + fit.reserved and fit.reserved > RESERVED
    assert found.fits["zero3_offload"].host > found.fits["zero3"].host
    # two ranks at best share the work equally, at 0.5 of 1e12 operations a second
    assert found.step_s >= found.hardware_flops / 2 / 0.5e12
    assert found.step_s <= 1.5 * found.hardware_flops / 2 / 0.5e12
    assert found.hours == pytest.approx(found.step_s * helpers.STEPS / 3600)
    assert found.price == pytest.approx(found.hours * 2 * 3.0)
    assert found.model_flops < found.hardware_flops


@pytest.mark.parametrize("family", [name for name in (*FAMILIES, *PROJECTED) if name != "foveated"])
def test_other_families_are_estimated_too(family: str, tmp_path: Path) -> None:
    found = run(tmp_path, "data.augment={}", "train.steps=1", *(FAMILIES | PROJECTED)[family])
    assert 0 < found.model_flops < found.hardware_flops and found.step_s > 0
    assert found.fits["zero2"].activations > 0
