"""Held-out loss during training: every rank its share, weighted by tokens."""

import itertools
from typing import Any

from vlm import dist
from vlm.data.loader import Loader
from vlm.engine.step import eval_step


def validate(engine: Any, loader: Loader, num_steps: int) -> dict[str, float]:
    """Fine and coarse loss per learned token over the first ``num_steps`` global steps."""
    engine.eval()
    sums = {"fine": 0.0, "coarse": 0.0}
    tokens = 0
    steps = iter(loader)
    for loaded in itertools.islice(steps, num_steps):
        found, num_tokens = eval_step(engine, loaded.batches, "coarse_fine")
        sums = {name: sums[name] + found[name] for name in sums}
        tokens += num_tokens
    steps.close()
    engine.train()
    fine, coarse, total = dist.all_reduce(
        [sums["fine"], sums["coarse"], float(tokens)], engine.device
    )
    return {
        "eval_loss": fine / total,
        "eval_loss_fine": fine / total,
        "eval_loss_coarse": coarse / total,
        "eval_loss_ratio": coarse / fine,
    }
