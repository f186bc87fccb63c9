"""Held-out loss during training: every rank its share, weighted by tokens."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from vlm import dist
from vlm.data.load.loader import LoadedStep
from vlm.engine.modes import AUTOREGRESSIVE
from vlm.engine.step import eval_step
from vlm.train.metrics import column


def validate(
    engine: Any,
    steps: Iterable[LoadedStep],
    *,
    mode: str | None = None,
    autoregressive: bool = False,
) -> dict[str, float]:
    """Losses per learned token over ``steps``, of which each rank runs its share.

    Args:
        mode: forward mode; None: the model's own.
        autoregressive: also run the model as at inference, frame after frame. Ranks then call it
            unequally often, so not under ZeRO-3.
    """
    engine.eval()
    sums: Counter[str] = Counter()
    tokens = 0
    for loaded in steps:
        found, num_tokens = eval_step(engine, loaded.batches, mode=mode)
        if autoregressive:
            alone, _ = eval_step(engine, loaded.batches, mode=AUTOREGRESSIVE)
            found[AUTOREGRESSIVE] = alone["loss"]
        sums.update(found)
        tokens += num_tokens
    engine.train()
    *totals, total = dist.all_reduce([*sums.values(), float(tokens)], engine.device)
    means = {name: value / total for name, value in zip(sums, totals, strict=True)}
    row = {f"eval_{column(name)}": mean for name, mean in means.items()}
    if {"fine", "coarse"} <= means.keys():
        row["eval_loss_ratio"] = means["coarse"] / means["fine"]
    return row
