"""Loss by group of samples (a source and a kind), added up on the device.

Not here: what the groups are, which is the loader's to say (``vlm.batch.Batch.groups``).
"""

from typing import Any

import torch
from torch import Tensor

from vlm.batch import Batch


def by_group(output: Any, batch: Batch, num_groups: int) -> Tensor:
    """(2, num_groups) float64: sums of the token losses of each group, and how many there are."""
    sums = torch.zeros(2, num_groups, dtype=torch.float64, device=batch.groups.device)
    if num_groups and output.token_losses is not None:
        sample = torch.searchsorted(batch.cu_seqlens, batch.target_index, right=True) - 1
        group, losses = batch.groups[sample], output.token_losses.double()
        sums[0].index_add_(0, group, losses)
        sums[1].index_add_(0, group, torch.ones_like(losses))
    return sums
