"""Memory, time and price of a run that has not started: what fits where, and what it costs.

1. The model is built on the meta device and frozen as the recipe says.
2. The plan gives its heaviest micro-batches and some of its steps (``vlm.estimate.workload``).
3. The heaviest say what fits (``vlm.estimate.fits``).
4. Operations of the steps give time and price (``vlm.models.flops``).

Not here: how it is shown (``launch/estimate.py``).
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vlm.config import Recipe
from vlm.engine import optim
from vlm.estimate import fits, workload
from vlm.estimate.fits import Fit, Hardware
from vlm.estimate.workload import Workload
from vlm.models.flops.counters import COUNTERS
from vlm.train import model as models


@dataclass(frozen=True)
class Estimate:
    source: str
    #: worst micro-batch: samples, padded tokens, frames, learned tokens
    worst: dict[str, int]
    fits: dict[str, Fit]
    #: which of them the DeepSpeed file is
    chosen: str
    advice: str
    num_parameters: int
    num_trainable: int
    num_steps: int
    #: operations of a step over all GPUs: needed, and executed (padding, recomputation)
    model_flops: float
    hardware_flops: float
    step_s: float
    hours: float
    price: float | None


def estimate(
    recipe: Recipe,
    ds_config: dict[str, Any],
    vocab_size: int,
    hardware: Hardware,
    progress: Callable[[int, int], None] | None = None,
) -> Estimate:
    """
    Args:
        ds_config: from ``vlm.engine.ds_config.resolve``, for GPUs.
        vocab_size: of the tokenizer.
        progress: Called with (steps looked at, steps of the run), as the plan is searched.

    Raises:
        ConfigError: parts that cannot be built, or a language model whose layers cannot be counted.
    """
    model = _meta_model(recipe, vocab_size)
    work = workload.of_recipe(recipe, _frame_size(model), hardware.num_gpus, progress)
    sizes = fits.sizes_of(model, recipe)
    needed, executed, step_s = _step(model, recipe, work, hardware)
    chosen = fits.stage_name(ds_config)
    shapes, stages = fits.fit_stages(model, sizes, recipe, ds_config, work, hardware)
    hours = step_s * recipe.train.steps / 3600
    return Estimate(
        source=work.source,
        worst={
            "samples": len(shapes.lengths),
            "padded_tokens": len(shapes.lengths) * max(shapes.lengths),
            "frames": shapes.num_frames,
            "learned_tokens": shapes.num_loss_tokens,
        },
        fits=stages,
        chosen=chosen,
        advice=fits.advice(chosen, stages, recipe, hardware),
        num_parameters=sizes.num_parameters,
        num_trainable=sizes.num_trainable,
        num_steps=recipe.train.steps,
        model_flops=needed,
        hardware_flops=executed,
        step_s=step_s,
        hours=hours,
        price=None if hardware.price is None else hours * hardware.num_gpus * hardware.price,
    )


def _meta_model(recipe: Recipe, vocab_size: int) -> Any:
    with torch.device("meta"):
        model = models.build(recipe, vocab_size)
    optim.freeze(model, recipe.model)
    return model


def _frame_size(model: Any) -> tuple[int, int]:
    """Height and width, px, where no manifest says it. A model that sees nothing takes any."""
    size = int(model.vision.tower.config.image_size) if hasattr(model, "vision") else 1
    return size, size


def _step(
    model: Any, recipe: Recipe, work: Workload, hardware: Hardware
) -> tuple[float, float, float]:
    """Operations of a step, needed and executed, and its seconds: those of its busiest rank."""
    counter = COUNTERS[type(model)](model)
    shares = dict(recipe.train.modes) or {model.modes[0]: 1.0}
    total = sum(shares.values())
    needed = executed = seconds = 0.0
    for mode, share in shares.items():
        for step in work.steps:
            ranks = [[counter.micro_batch(shapes, mode) for shapes in own] for own in step]
            weight = share / total / len(work.steps)
            needed += weight * sum(one.model for own in ranks for one in own)
            executed += weight * sum(one.hardware for own in ranks for one in own)
            busiest = max(sum(one.hardware for one in own) for own in ranks)
            seconds += weight * busiest / (hardware.gpu.peak_flops * hardware.mfu)
    return needed, executed, seconds


def as_dict(found: Estimate) -> dict[str, Any]:
    """For JSON; bytes stay bytes."""
    return dataclasses.asdict(found)
