"""The training step: A micro-batches in, one optimizer step, the global loss out.

Not here: where batches come from, logging, checkpoints, and anything about a model family.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from vlm import dist
from vlm.batch import Batch


class StepResult(NamedTuple):
    """One global step, the same on all ranks."""

    #: mean over the step's learned tokens, by name; "loss" is what was trained on
    losses: dict[str, float]
    #: before clipping; None where DeepSpeed does not measure it (stage 0 in fp32)
    grad_norm: float | None
    num_loss_tokens: int
    #: False if DeepSpeed skipped the step because gradients were not finite
    applied: bool


def train_step(engine: Any, batches: Sequence[Batch]) -> StepResult:
    """Runs one global step on this rank's micro-batches.

    Token losses are summed, never averaged, and divided by the number of learned tokens of the
    whole step, so any split of it over ranks and accumulation gives the same update.
    """
    device, world = engine.device, dist.world_size()
    (tokens,) = dist.all_reduce([sum(b.num_loss_tokens for b in batches)], device)
    sums: dict[str, torch.Tensor] = {}
    for index, batch in enumerate(batches):
        output = engine(batch.to(device))
        for name, value in {"loss": output.loss_sum, **output.parts}.items():
            sums[name] = sums.get(name, 0.0) + value.detach()
        engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
        # gradients are averaged over ranks: `world` undoes it
        engine.backward(output.loss_sum * (world / tokens), scale_wrt_gas=False)
        engine.step()
    norm = engine.get_global_grad_norm()
    totals = dist.all_reduce([float(v) for v in sums.values()], device)
    return StepResult(
        losses={name: total / tokens for name, total in zip(sums, totals, strict=True)},
        grad_norm=None if norm is None else float(norm),
        num_loss_tokens=int(tokens),
        applied=engine.was_step_applied(),
    )


@torch.no_grad()
def eval_step(engine: Any, batches: Sequence[Batch]) -> tuple[dict[str, float], int]:
    """Loss sums by name and the number of learned tokens, over this rank's micro-batches."""
    sums: dict[str, float] = {}
    for batch in batches:
        output = engine(batch.to(engine.device), with_coarse_loss=True)
        for name, value in {"loss": output.loss_sum, **output.parts}.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums, sum(b.num_loss_tokens for b in batches)
