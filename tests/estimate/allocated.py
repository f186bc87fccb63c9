"""What torch's allocator hands out in a forward and a backward pass, byte by byte, on a CPU."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from vlm.batch import Batch

#: a random state of the CPU: checkpointing keeps one for each block, on the host wherever it runs
RANDOM_STATE = torch.get_rng_state().nbytes
EDGE = "end of the forward pass"


class Allocated(NamedTuple):
    #: at the end of the forward pass
    kept: int
    peak: int


def drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def allocated(model: Any, batch: Batch, mode: str) -> Allocated:
    """Of one pass, without gradients of parameters and random states."""
    handles = [
        parameter.register_post_accumulate_grad_hook(drop_gradient)
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    model(batch, mode=mode).loss_sum.backward()  # what is made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = model(batch, mode=mode).loss_sum
        with record_function(EDGE):
            pass
        loss.backward()
    for handle in handles:
        handle.remove()
    events = profiler.profiler.kineto_results.events()
    (edge,) = (event.start_ns() for event in events if event.name() == EDGE)
    sizes = sorted(
        (event.start_ns(), event.nbytes())
        for event in events
        if event.name() == "[memory]" and abs(event.nbytes()) != RANDOM_STATE
    )
    live = kept = peak = 0
    for at, size in sizes:
        live += size
        kept = live if at < edge else kept
        peak = max(peak, live)
    return Allocated(kept, peak)
