"""Peak memory of cross entropy over a large vocabulary: all logits at once, or in pieces.

    python bench/loss_memory.py --vocabulary 49152 --tokens 8192

Each in a process of its own, forward and backward, on the CPU. Memory is resident memory at its
peak, less what was there before; a small width keeps weights and states out of the figures.
"""

import argparse
import multiprocessing
import resource
import sys
import time

import torch
from torch import nn

from vlm.models import token_loss

WIDTH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--tokens", type=int, default=8192)
    args = parser.parse_args()
    pieces = token_loss.loss_chunks(args.tokens, args.vocabulary)
    sys.stdout.write("| loss | peak MB | s | sum of losses |\n|---|---|---|---|\n")
    for name, chunks in (("all at once", 1), (f"{pieces} pieces", pieces)):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            megabytes, seconds, total = pool.apply(_run, (args.vocabulary, args.tokens, chunks))
        sys.stdout.write(f"| {name} | {megabytes:.0f} | {seconds:.1f} | {total:.6g} |\n")


def _run(vocabulary: int, tokens: int, chunks: int) -> tuple[float, float, float]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    head = nn.Linear(WIDTH, vocabulary, bias=False)
    states = torch.randn(tokens, WIDTH, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,))
    head(states[:1]).sum().backward()  # gradients of the weights are there in any case
    before, started = _peak_kib(), time.perf_counter()
    loss = token_loss.token_losses(head, states, targets, chunks).sum()
    loss.backward()
    seconds = time.perf_counter() - started
    return (_peak_kib() - before) / 1024, seconds, loss.item()


def _peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
