"""Held-out loss in all three modes, per learned token."""

from collections.abc import Iterable

import torch

from vlm.batch import Batch
from vlm.models.foveated import FoveatedModel


@torch.no_grad()
def mode_losses(model: FoveatedModel, batches: Iterable[Batch]) -> dict[str, float]:
    """Mean cross entropy over all learned tokens of ``batches``, by mode."""
    sums = {"coarse_only": 0.0, "coarse_fine": 0.0, "autoregressive": 0.0}
    tokens = 0
    for batch in batches:
        batch = batch.to(model.device)
        # one pass gives both: the coarse pass of coarse_fine is coarse_only
        parts = model(batch, mode="coarse_fine", with_coarse_loss=True).parts
        sums["coarse_only"] += float(parts["coarse"])
        sums["coarse_fine"] += float(parts["fine"])
        sums["autoregressive"] += float(model(batch, mode="autoregressive").parts["fine"])
        tokens += batch.num_loss_tokens
    return {mode: total / tokens for mode, total in sums.items()}
