"""The few collectives this toolkit needs; every one is the identity in a single process."""

import torch
import torch.distributed as dist


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    return rank() == 0


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
