"""Micro-batches on the device, each copied while the one before is computed."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vlm.batch import Batch


def on_device(batches: Sequence[Batch], device: torch.device) -> Iterator[Batch]:
    """``batches`` in order, where the model is. On a CPU they are there already."""
    if device.type == "cpu":
        yield from batches
        return
    copying = torch.cuda.Stream(device)
    ahead = _copy(batches[0], device, copying)
    for following in [*batches[1:], None]:
        batch = ahead
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copying)
        for value in vars(batch).values():
            if isinstance(value, Tensor):
                # its memory belongs to the other stream and must not be reused too early
                value.record_stream(computing)
        if following is not None:
            ahead = _copy(following, device, copying)
        yield batch


def _copy(batch: Batch, device: torch.device, stream: torch.cuda.Stream) -> Batch:
    with torch.cuda.stream(stream):
        return batch.to(device)


def to_host(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy that may still be on its way, and what to wait for before reading it."""
    if numbers.device.type == "cpu":
        return numbers, None
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived
