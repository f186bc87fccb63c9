"""Names the samples of a global step, from the plan alone: nothing of a shard is read.

    python tools/explain_step.py --recipe recipes/quickstart.yaml --step 1200
    python tools/explain_step.py --recipe R --step 1000000 --rank 3 --world-size 8 --json

Steps count from 0: step S trains on what a checkpoint after S steps has not seen yet. How many
steps each window has is kept below the recipe's output_dir, where a run leaves it, too; steps far
beyond what a run reached have to be counted first, once.

Exit codes: 0 shown, 2 a mistake in the recipe, manifests or command.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from vlm import config, errors
from vlm.arguments import add_recipe, count, positive, progress
from vlm.data.plan import plan_index, planning


def main(argv: Sequence[str]) -> int:
    args = _parse(argv)
    recipe = config.load(args.recipe, args.overrides)
    catalog, plan = planning.open_plan(recipe)
    with progress("steps") as advance:
        position = plan_index.seek(plan, args.step, recipe.output_dir, advance)
    found = planning.explain(catalog, plan, position, args.rank, args.world_size)
    sys.stdout.write(json.dumps(found) + "\n" if args.json else _to_text(found, args))
    return 0


def _to_text(found: dict[str, Any], args: argparse.Namespace) -> str:
    lines = [
        f"plan {found['plan_id']}, step {args.step}: step {found['step']} of window "
        f"{found['window']}, epoch {found['epoch']}; rank {args.rank} of {args.world_size}"
    ]
    for batch in found["micro_batches"]:
        lines.append(f"micro-batch {batch['index']}  {batch['kind']}  cost {batch['cost']:.1f}")
        lines.append("     row  kind   frames  tokens  shown  source  key  shard:offset")
        lines += [
            f"{one['row']:8}  {one['kind']:5}  {one['num_frames']:6}  {one['num_tokens']:6}  "
            f"{one['times_shown']:5}  {_plain(one['source'])}  {_plain(one['key'])}  "
            f"{_plain(one['shard'])}:{one['offset']}"
            for one in batch["samples"]
        ]
    return "\n".join(lines) + "\n"


def _plain(name: str) -> str:
    """A name from a shard may hold anything; a terminal should not."""
    return json.dumps(name)[1:-1]


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Name the samples of a step.")
    add_recipe(parser)
    parser.add_argument("--step", type=count, required=True, metavar="S")
    parser.add_argument("--rank", type=count, default=0, metavar="R")
    parser.add_argument("--world-size", type=positive, default=1, metavar="W")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    errors.command(main)()
