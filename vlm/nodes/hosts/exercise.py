"""How fast ranks compute and talk; started by torchrun on all hosts of a preflight.

Prints one JSON object on rank 0. Not here: what is too slow (``vlm.nodes.hosts.verdict``).
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from vlm.errors import command

TIMEOUT = timedelta(seconds=120)
NUM_ROUNDS = 5
#: rows of a square matrix, and bytes that are sent
GPU_ROWS, GPU_BYTES = 8192, 256 * 2**20
CPU_ROWS, CPU_BYTES = 512, 4 * 2**20


def measure(device: torch.device) -> dict[str, object]:
    """Figures of all hosts, on every rank. Collective.

    Returns:
        ``all_reduce_gbit``: bus bandwidth, 2 (n - 1) / n times the bytes over the time.
        ``gbit``: from each host to the next one, in a ring; None where there is one host.
        ``tflops``: of each rank, by host.
    """
    gpu = device.type == "cuda"
    num_bytes, ranks = GPU_BYTES if gpu else CPU_BYTES, dist.get_world_size()
    data = torch.ones(num_bytes // 4, device=device)
    seconds = _best(lambda: dist.all_reduce(data), device)
    mine = (int(os.environ["GROUP_RANK"]), _tflops(device))
    found: list[tuple[int, float]] = [mine] * ranks
    dist.all_gather_object(found, mine)
    hosts = sorted({host for host, _ in found})
    firsts = [next(r for r, (host, _) in enumerate(found) if host == h) for h in hosts]
    return {
        "all_reduce_gbit": 2 * (ranks - 1) / ranks * num_bytes * 8e-9 / seconds,
        "gbit": _ring(data, firsts, device),
        "tflops": [[speed for host, speed in found if host == h] for h in hosts],
    }


def _ring(data: Tensor, firsts: list[int], device: torch.device) -> list[float | None]:
    """One link after another, so that each has the network to itself."""
    if len(firsts) == 1:
        return [None]
    rank = dist.get_rank()
    speeds = []
    for index, source in enumerate(firsts):
        target = firsts[(index + 1) % len(firsts)]

        def send(source: int = source, target: int = target) -> None:
            if rank == source:
                dist.send(data, target)
            elif rank == target:
                dist.recv(data, source)

        seconds = _best(send, device)
        box = [data.numel() * 4 * 8e-9 / seconds]
        dist.broadcast_object_list(box, src=target)  # who receives knows how long it took
        speeds.append(box[0])
    return list(speeds)


def _tflops(device: torch.device) -> float:
    gpu = device.type == "cuda"
    rows, dtype = (GPU_ROWS, torch.bfloat16) if gpu else (CPU_ROWS, torch.float32)
    matrix = torch.ones(rows, rows, device=device, dtype=dtype)
    return 2e-12 * rows**3 / _best(lambda: matrix @ matrix, device)


def _best(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest round: what disturbs only ever slows."""
    times = []
    for _ in range(NUM_ROUNDS + 1):  # the first one warms up
        dist.barrier()
        started = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cpu", action="store_true", help="gloo, although there may be GPUs")
    cpu = parser.parse_args(argv).cpu
    device = torch.device("cpu" if cpu else f"cuda:{os.environ['LOCAL_RANK']}")
    if not cpu:
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if cpu else "nccl", timeout=TIMEOUT)
    found = measure(device)
    if dist.get_rank() == 0:
        sys.stdout.write(json.dumps(found) + "\n")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    command(main)()
