"""Times the plan and simulates ranks: how full micro-batches are, how even ranks, how fast.

    python bench/plan.py --samples 100000

Samples are synthetic: frames log-uniform over 1 to 64, text log-normal around 60 tokens, one in
ten samples text only. Every rank is simulated as costing what the plan says; nothing is trained.
"""

import argparse
import sys
import time

import numpy as np

from vlm.data.plan import Plan, Policy, Rows, Step, summary

SAMPLES_PER_SHARD = 1000
SIGMA = 0.6  # of the logarithm of a text's tokens


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
    parser = argparse.ArgumentParser(description="Time and simulate the plan.")
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--budget", type=int, nargs="+", default=[4096, 16_384])
    args = parser.parse_args()
    rows = synthetic_rows(args.samples, seed=0)
    sys.stdout.write(
        "batching   M=W  budget  windows  steps  fill_frac  balance  text_frac      s\n"
    )
    for batching in ("bucketed", "packed"):
        for budget in args.budget:
            for micro_batches in args.micro_batches:
                policy = Policy(
                    seed=1,
                    batching=batching,
                    micro_batches=micro_batches,
                    budget=budget,
                    frame_cost=16,
                    tokens_per_frame=1,
                    text_frac=0.1,
                    window=262_144,
                    loss_on="answers",
                )
                sys.stdout.write(f"{batching:8} {micro_batches:5} {budget:7}  ")
                sys.stdout.write(_measure(rows, policy) + "\n")
                sys.stdout.flush()


def _measure(rows: Rows, policy: Policy) -> str:
    started = time.perf_counter()
    plan = Plan(rows, policy, ["synthetic"])
    steps: list[Step] = []
    for window in range(plan.num_windows):
        steps += plan.window(window)
    seconds = time.perf_counter() - started
    found = summary(steps, policy, policy.micro_batches)
    return (
        f"{plan.num_windows:7} {len(steps):6} {found.fill_frac:10.4f} {found.balance:8.4f} "
        f"{found.text_frac:10.4f} {seconds:6.2f}"
    )


if __name__ == "__main__":
    main()
