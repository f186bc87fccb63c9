"""Held-out loss in all forward modes, per learned token."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch

from vlm.batch import Batch


@torch.no_grad()
def mode_losses(model: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """Mean loss over all learned tokens of ``batches``, by mode."""
    sums: Counter[str] = Counter()
    tokens = 0
    for batch in batches:
        found = model.losses_by_mode(batch.to(model.device))
        sums.update({mode: float(loss) for mode, loss in found.items()})
        tokens += batch.num_losses
    return {mode: total / tokens for mode, total in sums.items()}


def compare(losses: dict[str, float]) -> dict[str, float]:
    """What the losses of modes say about each other, where a model has those modes.

    ``loss_ratio`` is coarse / fine. ``autoregressive_gap_frac`` is how much more loss there is at
    inference, where each query comes from the fine stream before it, than in parallel, where all
    come from one coarse pass: 0.05 means 5 % more.
    """
    found = {}
    if {"coarse_only", "coarse_fine"} <= losses.keys():
        found["loss_ratio"] = losses["coarse_only"] / losses["coarse_fine"]
    if {"autoregressive", "coarse_fine"} <= losses.keys():
        found["autoregressive_gap_frac"] = losses["autoregressive"] / losses["coarse_fine"] - 1
    return found
