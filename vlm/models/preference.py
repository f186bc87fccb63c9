"""What token losses mean to a model: their sum, or for pairs of answers how much it prefers one.

Direct preference optimisation: with b = ``batch.dpo_beta``, the summed log-probability p of an
answer's tokens, and r the same of the model before the first step,

    loss = -log sigmoid(b ((p_chosen - r_chosen) - (p_rejected - r_rejected)))

summed over pairs. Not here: where r comes from (``vlm.train.reference``).

Legend: T learned tokens, S samples, P pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.batch import Batch
from vlm.models.language import coordinates


def objective(losses: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """What is minimised, and what is measured beside it, both as sums over ``batch.num_losses``.

    Args:
        losses: (T,) cross entropies of the learned tokens.

    Returns:
        The sum of losses; of pairs that of their losses, with "reward_accuracy" (the chosen answer
        gained more than the rejected one) and "reward_margin" (by how much).
    """
    if batch.reference is None:
        return losses.sum(), {}
    pairs = answer_log_probs(losses, batch)[: batch.reference.numel()].view(-1, 2)
    reward = batch.dpo_beta * (pairs - batch.reference.to(pairs))  # (P, 2)
    margin = reward[:, 0] - reward[:, 1]
    measured = margin.detach()
    return -F.logsigmoid(margin).sum(), {
        "reward_accuracy": (measured > 0).to(losses.dtype).sum(),
        "reward_margin": measured.sum(),
    }


def answer_log_probs(losses: Tensor, batch: Batch) -> Tensor:
    """(T,) cross entropies -> (S,) log-probabilities of all that is learned of each sample."""
    sample = coordinates(batch)[0][batch.target_index]
    sums = torch.zeros(batch.num_samples, dtype=losses.dtype, device=losses.device)
    return -sums.index_add(0, sample, losses)
