"""Out of memory on one rank: all ranks go down a ladder together, and the step is run again.

A rank whose forward pass finds no memory runs its shortest sample instead, so that nobody waits for
it; the loss is nan then, so all ranks throw the step away, and a flag tells all of them why. Each
rung needs less memory and computes the same: micro-batches in halves, quarters and eighths, then
activations computed twice. Fewer frames or shorter text, which the model would learn other things
from, are for the recipe to say.

Under ZeRO-3 ranks gather parameters within the forward pass, and in the backward pass ZeRO reduces
gradients: there a stand-in would not match what the others wait for, and the error ends the run.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from vlm.batch import Batch

#: what each rung does, from the first one down
RUNGS = (
    "micro-batches in halves",
    "micro-batches in quarters",
    "micro-batches in eighths",
    "gradient checkpointing of every part",
)
CUTS = 3


def go_down(engine: Any, rung: int) -> None:
    """Sets up a rung, counted from 1; 0 changes nothing."""
    if rung > CUTS:
        model = engine.module
        model.language.lm.gradient_checkpointing_enable({"use_reentrant": False})
        for name, part in model.named_children():
            if name != "language":  # a blind model has no other
                part.gradient_checkpointing = True


def cut(batches: Iterable[Batch], rung: int) -> list[Batch]:
    """Micro-batches in 2 ** rung pieces each, as many on every rank; those too few have no loss."""
    num = 2 ** min(rung, CUTS)
    return [piece for batch in batches for piece in _pieces(batch, num)]


def _pieces(batch: Batch, num: int) -> list[Batch]:
    if num == 1:
        return [batch]
    unit = _unit(batch)
    edges = [unit * (batch.num_samples // unit * i // num) for i in range(num + 1)]
    return [
        part(batch, first, last) if first < last else stand_in(batch)
        for first, last in zip(edges, edges[1:], strict=False)
    ]


def stand_in(batch: Batch) -> Batch:
    """Its shortest sample, of which nothing is learned."""
    one = _shortest(batch)
    return dataclasses.replace(
        one,
        target_index=one.target_index[:0],
        targets=one.targets[:0],
        pair_rows=_pairs(one.pair_rows, 0, 0),
        reference=_pairs(one.reference, 0, 0),
    )


def _shortest(batch: Batch) -> Batch:
    unit = _unit(batch)
    index = unit * int(batch.cu_seqlens.diff().view(-1, unit).sum(1).argmin())
    return part(batch, index, index + unit)


def _unit(batch: Batch) -> int:
    """Samples that must stay together: a pair's two."""
    return 1 if batch.pair_rows is None else 2


def _pairs(of_each: torch.Tensor | None, first: int, last: int) -> torch.Tensor | None:
    """Those of samples ``first`` to ``last``."""
    return None if of_each is None else of_each[first // 2 : last // 2]


def part(batch: Batch, first: int, last: int) -> Batch:
    """Samples ``first`` to ``last`` as a micro-batch of their own; at least one."""
    start, stop = batch.cu_seqlens[first].item(), batch.cu_seqlens[last].item()
    begin, end = int(batch.cu_frames[first]), int(batch.cu_frames[last])
    # without any: somebody's, and nobody looks at it
    own = slice(begin, end) if begin < end else slice(0, 1)
    placed = _within(batch.frame_index, start, stop)
    learned = _within(batch.target_index, start, stop)
    positions, frame_index = batch.position_ids[start:stop], batch.frame_index[placed] - start
    has_frames = frame_index.numel() > 0
    return dataclasses.replace(
        batch,
        frames=batch.frames[own],
        latents=None if batch.latents is None else batch.latents[own],
        cu_frames=batch.cu_frames[first : last + 1] - batch.cu_frames[first],
        input_ids=batch.input_ids[start:stop],
        labels=batch.labels[start:stop],
        position_ids=positions,
        cu_seqlens=batch.cu_seqlens[first : last + 1] - start,
        frame_index=frame_index,
        target_index=batch.target_index[learned] - start,
        targets=batch.targets[learned],
        groups=batch.groups[first:last],
        max_seqlen=int(batch.cu_seqlens[first : last + 1].diff().max()),
        max_prefix=int(positions[frame_index].max()) + 1 if has_frames else 1,
        max_frames=max(1, int(batch.cu_frames[first : last + 1].diff().max())),
        keys=batch.keys[first:last],
        kind=batch.kind if begin < end else "text",
        pair_rows=_pairs(batch.pair_rows, first, last),
        reference=_pairs(batch.reference, first, last),
    )


def _within(index: torch.Tensor, start: float, stop: float) -> torch.Tensor:
    return (index >= start) & (index < stop)


def forward(engine: Any, batch: Batch, options: dict[str, Any]) -> tuple[Any, bool]:
    """The output for a micro-batch, and whether a stand-in had to take its place.

    Raises:
        torch.OutOfMemoryError: where no stand-in is possible.
    """
    try:
        return engine(batch, **options), False
    except torch.OutOfMemoryError:
        if engine.zero_optimization_stage() == 3:
            raise
    # out of the handler, whose traceback holds what the forward pass had allocated
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    output = engine(_shortest(batch), **options)
    return output._replace(loss_sum=output.loss_sum * torch.nan, token_losses=None), True
