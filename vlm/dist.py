"""The few collectives this toolkit needs; every one is the identity in a single process."""

import os
from typing import Any

import torch
import torch.distributed as dist


def is_distributed() -> bool:
    """Whether there is anybody to ask: a collective among one costs it half a millisecond."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    return rank() == 0


def is_local_main() -> bool:
    """The first rank of its host, as the launcher says."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def barrier() -> None:
    if is_distributed():
        dist.barrier()


def all_reduce(values: list[float], device: torch.device, op: str = "sum") -> list[float]:
    """Element-wise ``sum``, ``min`` or ``max`` of ``values`` over ranks, in float64."""
    if not is_distributed():
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=getattr(dist.ReduceOp, op.upper()))
    return tensor.tolist()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Adds ``tensor`` up over ranks, in place and where it lies: the host waits for nothing."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def gather_objects(value: object) -> list:
    """``value`` of every rank, in rank order, on every rank. Only for small, trusted values:
    it pickles, and its peers are our own processes."""
    if not is_distributed():
        return [value]
    out: list = [None] * world_size()
    dist.all_gather_object(out, value)
    return out


def broadcast_object(value: object) -> object:
    """Rank 0's ``value`` on every rank."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class Vote:
    """The maximum over ranks of small whole numbers, in host memory, without waiting for anybody.

    ``start`` gives this rank's; ``wait`` returns the maxima, which by then have long arrived. All
    ranks call both in the same order.
    """

    def __init__(self) -> None:
        # gloo on a GPU too: what goes over the host delays no kernel
        self._group = dist.new_group(backend="gloo") if is_distributed() else None
        self._pending: tuple[torch.Tensor, Any] | None = None

    @property
    def pending(self) -> bool:
        return self._pending is not None

    def start(self, values: list[int]) -> None:
        tensor = torch.tensor(values, dtype=torch.int64)
        work = None
        if self._group is not None:
            work = dist.all_reduce(tensor, dist.ReduceOp.MAX, self._group, async_op=True)
        self._pending = (tensor, work)

    def wait(self) -> list[int]:
        assert self._pending is not None
        (tensor, work), self._pending = self._pending, None
        if work is not None:
            work.wait()
        return tensor.tolist()

    def close(self) -> None:
        """All ranks together, when nothing is pending."""
        assert self._pending is None
        if self._group is not None:
            dist.destroy_process_group(self._group)
