"""The training step: A micro-batches in, one optimizer step, the global loss out.

Nothing here waits for the device: a step's numbers stay there until ``read``. Not here: where
batches come from, logging, checkpoints, and anything about a model family.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlm import dist
from vlm.batch import Batch
from vlm.engine.signature import agreed
from vlm.engine.transfer import on_device, to_host


class StepResult(NamedTuple):
    """One global step, the same on all ranks."""

    #: mean over the step's learned tokens, by name; "loss" is what was trained on
    losses: dict[str, float]
    #: before clipping; None where DeepSpeed does not measure it (stage 0 in fp32)
    grad_norm: float | None
    num_loss_tokens: int
    #: False if DeepSpeed skipped the step because gradients were not finite
    applied: bool


class Pending(NamedTuple):
    """A step whose numbers may not have arrived yet."""

    names: tuple[str, ...]
    #: (names + 2,) float64: loss sums, loss tokens, gradient norm
    numbers: Tensor
    arrived: torch.cuda.Event | None
    has_norm: bool
    applied: bool


def train_step(
    engine: Any,
    batches: Sequence[Batch],
    *,
    mode: str | None = None,
    measure_all: bool = False,
    agree: bool = False,
) -> Pending:
    """Runs one global step on this rank's micro-batches.

    Token losses are summed, never averaged, and divided by the number of learned tokens of the
    whole step, so any split of it over ranks and accumulation gives the same update.

    Args:
        mode: forward mode of the whole step; None: the model's own.
        measure_all: also measure losses that have no weight; gradients are the same.
        agree: check that all ranks call the same modules (``vlm.engine.signature``).
    """
    device = engine.device
    options: dict[str, Any] = {"measure_all": measure_all}
    options |= {} if mode is None else {"mode": mode}
    tokens = torch.full((1,), sum(b.num_loss_tokens for b in batches), dtype=torch.float64)
    tokens = dist.sum_over_ranks(tokens.to(device, non_blocking=True))
    # gradients are averaged over ranks: the number of ranks undoes it
    scale = (dist.world_size() / tokens[0]).float()
    sums: dict[str, Tensor] = {}
    for index, batch in enumerate(on_device(batches, device)):
        about = f"mode {mode}, micro-batch {index} of {len(batches)}"
        with agreed(engine, about) if agree else nullcontext():
            output = engine(batch, **options)
        add(sums, output)
        engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
        engine.backward(output.loss_sum * scale, scale_wrt_gas=False)
        engine.step()
    norm = engine.get_global_grad_norm()
    totals = dist.sum_over_ranks(torch.stack([*sums.values()]).double())
    known = torch.as_tensor(0.0 if norm is None else norm, dtype=torch.float64, device=device)
    numbers, arrived = to_host(torch.cat([totals, tokens, known.view(1)]))
    return Pending(tuple(sums), numbers, arrived, norm is not None, engine.was_step_applied())


def add(sums: dict[str, Tensor], output: Any) -> None:
    """Adds the loss sums of one micro-batch, on its device."""
    for name, value in {"loss": output.loss_sum, **output.parts}.items():
        sums[name] = value.detach() + sums[name] if name in sums else value.detach()


def read(pending: Pending) -> StepResult:
    """The numbers of a step, after those of its device have arrived; later steps may be running."""
    if pending.arrived is not None:
        pending.arrived.synchronize()
    *totals, tokens, norm = pending.numbers.tolist()
    return StepResult(
        losses={name: total / tokens for name, total in zip(pending.names, totals, strict=True)},
        grad_norm=norm if pending.has_norm else None,
        num_loss_tokens=int(tokens),
        applied=pending.applied,
    )


@torch.no_grad()
def eval_step(engine: Any, batches: Sequence[Batch]) -> tuple[dict[str, float], int]:
    """Loss sums by name and the number of learned tokens, over this rank's micro-batches."""
    sums: dict[str, Tensor] = {}
    for batch in on_device(batches, engine.device):
        add(sums, engine(batch, measure_all=True))
    return {k: float(v) for k, v in sums.items()}, sum(b.num_loss_tokens for b in batches)
