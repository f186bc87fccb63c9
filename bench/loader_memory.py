"""Loads step after step and prints what memory the process holds: a line that has to stay flat.

    python bench/loader_memory.py --recipe recipes/quickstart.yaml --steps 20000

One rank, no model. At a step a second, 3,600 steps are an hour of training.
"""

import argparse
import time
from collections.abc import Sequence
from contextlib import closing

import psutil

from vlm import config
from vlm.arguments import add_recipe, positive
from vlm.data.plan.plan import Position
from vlm.errors import command
from vlm.train import data

NUM_LINES = 10


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_recipe(parser)
    parser.add_argument("--steps", type=positive, default=20_000)
    args = parser.parse_intermixed_args(argv)
    recipe = config.load(args.recipe, args.overrides)
    source = data.open_source(recipe, data.load_tokenizer(recipe), training=True)
    process, started, samples = psutil.Process(), time.perf_counter(), 0
    print("| steps | samples | seconds | MB |\n|---|---|---|---|")
    with closing(data.steps(source, recipe, 0, 1, Position())) as steps:
        for number, loaded in zip(range(1, args.steps + 1), steps, strict=False):
            samples += sum(len(batch.keys) for batch in loaded.batches)
            if number % max(1, args.steps // NUM_LINES) == 0:
                seconds, held = time.perf_counter() - started, process.memory_info().rss / 1e6
                print(f"| {number:,} | {samples:,} | {seconds:.0f} | {held:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    command(main)()
