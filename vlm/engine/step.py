"""The training step: A micro-batches in, one optimizer step, the global loss out.

Nothing here waits for the device: a step's numbers stay there until ``read``. Not here: where
batches come from, logging, checkpoints, and anything about a model family.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlm import dist
from vlm.batch import Batch
from vlm.config_model import COMPONENTS
from vlm.engine import ladder
from vlm.engine.signature import agreed
from vlm.engine.tally import by_group
from vlm.engine.transfer import on_device, to_host


class StepResult(NamedTuple):
    """One global step, the same on all ranks."""

    #: mean over the step's learned tokens (or pairs), by name; "loss" is what was trained on
    losses: dict[str, float]
    #: of each group of samples: sum over its learned tokens, and their number
    groups: list[tuple[float, float]]
    #: before clipping; infinite if the step was not applied, nan where it is not measured
    grad_norm: float
    #: by component, of those where there is one that was measured
    grad_norms: dict[str, float]
    #: means of what the model measured beside its losses, by name; nan where there was nothing
    measures: dict[str, float]
    #: or pairs, where those are learned from
    num_loss_tokens: int
    #: micro-batches of all ranks that found no memory; the step was not applied then
    num_lost: int
    #: False if the step was left out: gradients were not finite, or the loss above its limit
    applied: bool


class Pending(NamedTuple):
    """A step whose numbers may not have arrived yet."""

    names: tuple[str, ...]
    measures: tuple[str, ...]
    #: float64: loss tokens, gradient norms of components, loss sums of names, sums and numbers of
    #: tokens of groups, sums and counts of measures, micro-batches without memory
    numbers: Tensor
    arrived: torch.cuda.Event | None
    applied: bool


def train_step(
    engine: Any,
    batches: Sequence[Batch],
    *,
    mode: str | None = None,
    measure_all: bool = False,
    agree: bool = False,
    loss_limit: float = math.inf,
    num_groups: int = 0,
) -> Pending:
    """Runs one global step on this rank's micro-batches.

    Token losses are summed, never averaged, and divided by the number of learned tokens of the
    whole step, so any split of it over ranks and accumulation gives the same update.

    Args:
        mode: forward mode of the whole step; None: the model's own.
        measure_all: also measure losses that have no weight; gradients are the same.
        agree: check that all ranks call the same modules (``vlm.engine.signature``).
        loss_limit: a step whose loss is above it is left out.
        num_groups: of samples, whose losses are also told apart.
    """
    device = engine.device
    options: dict[str, Any] = {"measure_all": measure_all}
    options |= {} if mode is None else {"mode": mode}
    tokens = torch.full((1,), sum(b.num_losses for b in batches), dtype=torch.float64)
    tokens = dist.sum_over_ranks(tokens.to(device, non_blocking=True))
    # gradients are averaged over ranks: the number of ranks undoes it
    scale = (dist.world_size() / tokens[0]).float()
    sums: dict[str, Tensor] = {}
    measures: dict[str, Tensor] = {}
    num_lost = torch.zeros(1, dtype=torch.float64, device=device)
    groups = torch.zeros(2, num_groups, dtype=torch.float64, device=device)
    for index, batch in enumerate(on_device(batches, device)):
        about = f"mode {mode}, micro-batch {index} of {len(batches)}"
        with agreed(engine, about) if agree else nullcontext():
            output, lost = ladder.forward(engine, batch, options)
        num_lost += lost
        add(sums, losses_of(output))
        add(measures, output.measures)
        groups += by_group(output, batch, num_groups)
        last = index == len(batches) - 1
        if last:
            found = [torch.stack([*sums.values()]).double(), groups.flatten()]
            known = torch.cat([*found, *measures.values(), num_lost])
            totals = dist.sum_over_ranks(known)
            # gradients that are not finite are thrown away on all ranks; nobody waits for the loss
            scale = torch.where(totals[0] / tokens[0] <= loss_limit, scale, math.nan)
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(output.loss_sum * scale, scale_wrt_gas=False)
        if finite := not last or engine.grad_norms.before_step():
            engine.step()
    if not engine.was_step_applied():
        # DeepSpeed holds rates back then; a recipe names them, and what thaws, by the step of a run
        engine.lr_scheduler.step()
    numbers, arrived = to_host(torch.cat([tokens, engine.grad_norms.take(), totals]))
    applied = finite and engine.was_step_applied()
    return Pending(tuple(sums), tuple(measures), numbers, arrived, applied)


def losses_of(output: Any) -> dict[str, Tensor]:
    """The loss sums of one micro-batch by name."""
    return {"loss": output.loss_sum, **output.parts}


def add(sums: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Adds what one micro-batch came to, on its device."""
    for name, value in values.items():
        sums[name] = value.detach() + sums[name] if name in sums else value.detach()


def read(pending: Pending) -> StepResult:
    """The numbers of a step, after those of its device have arrived; later steps may be running."""
    if pending.arrived is not None:
        pending.arrived.synchronize()
    found = pending.numbers.tolist()
    edge = 1 + len(COMPONENTS)
    tokens, norms, totals = found[0], found[1:edge], found[edge:-1]
    tail = len(totals) - 2 * len(pending.measures)
    groups, measured = totals[len(pending.names) : tail], totals[tail:]
    known: dict[str, float] = {
        name: norm for name, norm in zip(COMPONENTS, norms, strict=True) if not math.isnan(norm)
    }
    total_norm = math.hypot(*known.values()) if known else math.nan
    return StepResult(
        losses={name: total / tokens for name, total in zip(pending.names, totals, strict=False)},
        groups=list(zip(groups[: len(groups) // 2], groups[len(groups) // 2 :], strict=True)),
        grad_norm=total_norm if pending.applied else math.inf,
        grad_norms=known,
        measures={
            name: total / count if count else math.nan
            for name, total, count in zip(
                pending.measures, measured[::2], measured[1::2], strict=True
            )
        },
        num_loss_tokens=int(tokens),
        num_lost=int(found[-1]),
        applied=pending.applied,
    )


@torch.no_grad()
def eval_step(
    engine: Any, batches: Sequence[Batch], *, mode: str | None = None
) -> tuple[dict[str, float], int]:
    """Loss sums by name and what they are divided by, over this rank's micro-batches.

    Args:
        mode: None: the model's own.
    """
    options: dict[str, Any] = {"measure_all": True}
    options |= {} if mode is None else {"mode": mode}
    sums: dict[str, Tensor] = {}
    for batch in on_device(batches, engine.device):
        add(sums, losses_of(engine(batch, **options)))
    return {k: float(v) for k, v in sums.items()}, sum(b.num_losses for b in batches)
