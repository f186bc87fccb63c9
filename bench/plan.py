"""Simulates ranks: how full micro-batches are, how even ranks, how fast the plan; beside rivals.

    python bench/plan.py --samples 1000000

Samples are synthetic: frames log-uniform over 1 to 64, text log-normal around 60 tokens, one in
ten samples text only. A sample costs its tokens plus 16 for each frame, a micro-batch at most the
budget, and a step as much as its busiest rank; nothing is trained. Times are CPU seconds of one
core: opening the plan, seeking step 1,000,000 in it, planning one epoch. Today's practice, each at
its best under the same budget:

* random: so many random samples a rank that the costliest batch of all just fits; no padding
* padded: the same, rows padded to the longest and clips to the most frames, as dense loaders do
* greedy: each rank packs the samples of its own random stream until the next one does not fit
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np

from vlm.data.plan.plan import Plan, Policy, Rows, assign
from vlm.data.plan.position import Position

SAMPLES_PER_SHARD = 1000
SIGMA = 0.6  # of the logarithm of a text's tokens
FRAME_COST = 16
SEEK_STEP = 1_000_000


def synthetic_rows(num_samples: int, seed: int) -> Rows:
    rng = np.random.default_rng(seed)
    is_text = rng.random(num_samples) < 0.1
    frames = np.exp(rng.uniform(0, np.log(65), num_samples)).astype(np.int64).clip(1, 64)
    tokens = np.exp(rng.normal(np.log(60), SIGMA, num_samples)).astype(np.int64).clip(4, 4000)
    return Rows(
        num_frames=np.where(is_text, 0, frames).astype(np.uint32),
        num_tokens=tokens.astype(np.uint32),
        kind=np.where(is_text, 0, 2).astype(np.uint32),
        shard=(np.arange(num_samples) // SAMPLES_PER_SHARD).astype(np.uint32),
        num_loss_tokens=(tokens // 2).astype(np.uint32),
        first_rows=np.array([0, num_samples]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and simulate the plan, beside rivals.")
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--budget", type=int, default=16_384)
    parser.add_argument("--no-rivals", action="store_true", help="time the plan alone")
    args = parser.parse_args()
    rows = synthetic_rows(args.samples, seed=0)
    sys.stdout.write(
        "method    ranks   steps  fill_frac  max/mean  text_frac  open s  seek s  plan s\n"
    )
    for ranks in args.ranks:
        for batching in ("bucketed", "packed"):
            sys.stdout.write(_plan(rows, batching, ranks, args.budget) + "\n")
            sys.stdout.flush()
        for name, rival in {} if args.no_rivals else RIVALS.items():
            sys.stdout.write(_line(name, ranks, *_summary(rival(rows, ranks, args.budget))) + "\n")
            sys.stdout.flush()
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    sys.stdout.write(f"{args.samples} samples, peak memory {peak_gb:.2f} GB\n")


#: a step: cost without padding as a share of the budget, and cost as executed, of each rank
Simulated = Iterator[tuple[np.ndarray, np.ndarray]]


def make_policy(batching: str, ranks: int, budget: int) -> Policy:
    return Policy(
        seed=1,
        batching="packed" if batching == "packed" else "bucketed",
        micro_batches=ranks,
        budget=budget,
        frame_cost=FRAME_COST,
        tokens_per_frame=1,
        text_frac=0.1,
        window=262_144,
        loss_on="answers",
    )


def _plan(rows: Rows, batching: str, ranks: int, budget: int) -> str:
    policy = make_policy(batching, ranks, budget)
    started = time.process_time()
    plan = Plan(rows, policy, ["synthetic"])
    open_s = time.process_time() - started
    # as a checkpoint keeps it; about where the step lies, since windows differ by a step or two
    position = Position(SEEK_STEP // plan.steps_in_window(0), 0, SEEK_STEP)
    started = time.process_time()
    next(plan.steps(position))
    seek_s = time.process_time() - started
    num_text = num_samples = 0
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    seconds = 0.0
    for window in range(plan.num_windows):
        started = time.process_time()
        steps = plan.window(window)
        seconds += time.process_time() - started
        for step in steps:
            real = [(b.num_tokens + FRAME_COST * b.num_frames) / budget for b in step]
            own = [sum(step[i].cost for i in one) for one in assign([b.cost for b in step], ranks)]
            parts.append((np.array(real), np.array(own)))
            num_text += sum(b.num_text for b in step)
            num_samples += sum(len(b.rows) for b in step)
    line = _line(batching, ranks, *_summary(iter(parts)))
    return f"{line} {num_text / num_samples:9.4f} {open_s:7.2f} {seek_s:7.2f} {seconds:7.2f}"


def _summary(steps: Simulated) -> tuple[int, float, float]:
    fills, balances = [], []
    for real, loads in steps:
        fills.append(float(real.mean()))
        balances.append(float(loads.max() / loads.mean()))
    return len(fills), float(np.mean(fills)), float(np.mean(balances))


def _line(name: str, ranks: int, num_steps: int, fill_frac: float, balance: float) -> str:
    return f"{name:8} {ranks:6} {num_steps:7} {fill_frac:10.4f} {balance:9.4f}"


def _shuffled(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and frames in one random order."""
    order = np.random.default_rng(1).permutation(len(rows))
    return rows.sizes(order, tokens_per_frame=1)


def _random(rows: Rows, ranks: int, budget: int) -> Simulated:
    lengths, frames = _shuffled(rows)
    costs = lengths + FRAME_COST * frames
    return _fixed(costs, ranks, budget, lambda size: _batches(costs, size).sum(axis=1))


def _padded(rows: Rows, ranks: int, budget: int) -> Simulated:
    lengths, frames = _shuffled(rows)

    def executed(size: int) -> np.ndarray:
        longest, most = _batches(lengths, size).max(axis=1), _batches(frames, size).max(axis=1)
        return size * (longest + FRAME_COST * most)

    return _fixed(lengths + FRAME_COST * frames, ranks, budget, executed)


def _batches(values: np.ndarray, size: int) -> np.ndarray:
    """(batches, size); what is left over is dropped."""
    return values[: len(values) // size * size].reshape(-1, size)


def _fixed(
    costs: np.ndarray, ranks: int, budget: int, executed: Callable[[int], np.ndarray]
) -> Simulated:
    """Batches of one size: the largest at which none is above the budget."""
    size = 1
    while executed(size + 1).max() <= budget:
        size += 1
    real, loads = _batches(costs, size).sum(axis=1) / budget, executed(size)
    for start in range(0, len(loads) - ranks + 1, ranks):
        yield real[start : start + ranks], loads[start : start + ranks]


def _greedy(rows: Rows, ranks: int, budget: int) -> Simulated:
    lengths, frames = _shuffled(rows)
    costs = lengths + FRAME_COST * frames
    own = []
    for part in np.array_split(costs, ranks):
        sums, start = np.concatenate([[0], np.cumsum(part)]), 0
        loads = []
        while start < len(part):
            stop = int(np.searchsorted(sums, sums[start] + budget, "right")) - 1
            loads.append(int(sums[stop] - sums[start]))
            start = stop
        own.append(loads[:-1])  # the last is not full
    for step in zip(*own, strict=False):  # until the first rank has no more
        yield np.array(step) / budget, np.array(step)


RIVALS: dict[str, Callable[[Rows, int, int], Simulated]] = {
    "random": _random,
    "padded": _padded,
    "greedy": _greedy,
}


if __name__ == "__main__":
    main()
