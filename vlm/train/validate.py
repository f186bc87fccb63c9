"""Held-out loss during training: every rank its share, weighted by tokens."""

from collections.abc import Iterable
from typing import Any

from vlm import dist
from vlm.data.loader import LoadedStep
from vlm.engine.step import eval_step


def validate(engine: Any, steps: Iterable[LoadedStep]) -> dict[str, float]:
    """Losses per learned token over ``steps``, of which each rank runs its share."""
    engine.eval()
    sums = {"loss": 0.0, "fine": 0.0, "coarse": 0.0}
    tokens = 0
    for loaded in steps:
        found, num_tokens = eval_step(engine, loaded.batches)
        sums = {name: sums[name] + found[name] for name in sums}
        tokens += num_tokens
    engine.train()
    loss, fine, coarse, total = dist.all_reduce([*sums.values(), float(tokens)], engine.device)
    return {
        "eval_loss": loss / total,
        "eval_loss_fine": fine / total,
        "eval_loss_coarse": coarse / total,
        "eval_loss_ratio": coarse / fine,
    }
