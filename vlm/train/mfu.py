"""Model FLOPs utilisation: what a run's mathematics needs a second, over what its GPUs can do.

Counted for the step that is logged and carried over to the steps around it by their cost, so that
no other step counts anything. Not here: the count itself (``vlm.models.flops``), and the peaks
(``vlm.gpus``).
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch

from vlm import dist, gpus
from vlm.batch import Batch
from vlm.engine.modes import forward_mode
from vlm.errors import ConfigError
from vlm.models.flops.counters import COUNTERS
from vlm.models.flops.shapes import shapes_of
from vlm.train.run import Run

log = logging.getLogger(__name__)


def step_flops(run: Run, step: int, batches: Sequence[Batch]) -> float | None:
    """Forward and backward of a global step (counted from 0), of all ranks, which call it together.

    None, with a warning, where the language model's layers cannot be counted.
    """
    model: Any = run.engine.module
    mode: Any = forward_mode(run.recipe, step) or model.modes[0]
    try:
        counter = COUNTERS[type(model)](model)
    except ConfigError as error:  # no reason to end a run
        _warn_once(str(error))
        return None
    own = sum(counter.micro_batch(shapes_of(batch), mode).model for batch in batches)
    return dist.all_reduce([own], run.engine.device)[0]


@functools.cache
def _warn_once(reason: str) -> None:
    log.warning("no MFU: %s", reason)


def peak_flops() -> float | None:
    """What this rank's GPU can do a second; None on a CPU, or where its type is not known."""
    if not torch.cuda.is_available():
        return None
    memory_gib = torch.cuda.get_device_properties().total_memory / 2**30
    gpu = gpus.of_device(torch.cuda.get_device_name(), memory_gib)
    return None if gpu is None else gpu.peak_flops


def utilisation(flops: float | None, peak: float | None, num_ranks: int) -> dict[str, float | None]:
    """Columns of the metrics.

    Args:
        flops: a second, of all ranks.
    """
    return {
        "tflops_per_s": None if flops is None else flops / 1e12,
        "mfu_frac": None if flops is None or peak is None else flops / (peak * num_ranks),
    }
