"""Shows what would train together: the steps of a plan, without reading a sample.

    python tools/show_plan.py --recipe recipes/quickstart.yaml --world-size 2 --steps 3
    python tools/show_plan.py --recipe R --manifest M --steps 50 --json data.batching=packed

A step's hash covers the keys of its samples in their order. It does not depend on --world-size.

Exit codes: 0 shown, 2 a mistake in the recipe, manifest or command.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm import config, errors
from vlm.arguments import add_recipe, positive
from vlm.data.plan import planning

UNITS = ("samples", "frames", "tokens")


def main(argv: Sequence[str]) -> int:
    args = _parse(argv)
    one = [f"data.train={json.dumps(str(args.manifest))}"] if args.manifest else []
    recipe = config.load(args.recipe, [*args.overrides, *one])
    catalog, plan = planning.open_plan(recipe)
    shown = planning.describe(plan, catalog, args.world_size, args.steps)
    sys.stdout.write(json.dumps(shown) + "\n" if args.json else _to_text(shown))
    return 0


def _to_text(shown: dict[str, Any]) -> str:
    lines = [f"plan {shown['plan_id']}"]
    for index, step in enumerate(shown["steps"]):
        lines.append(f"step {index}  {step['hash']}")
        lines.append("  rank  kind   samples   frames    tokens       cost")
        lines += [
            f"  {b['rank']:4}  {b['kind']:5}  {b['num_samples']:7}  {b['num_frames']:7}  "
            f"{b['num_tokens']:8}  {b['cost']:9.1f}"
            for b in step["micro_batches"]
        ]
    totals = Counter[str]()
    for source in shown["sources"]:
        totals.update({unit: source[f"num_{unit}"] for unit in UNITS})
    for source in shown["sources"]:
        # text alone has no frames
        shares = [f"{source[f'num_{u}'] / max(totals[u], 1):6.1%} of the {u}" for u in UNITS]
        lines.append(f"source {source['name']}: {', '.join(shares)}")
    lines.append(
        f"fill {shown['fill_frac']:.1%} of the budget, busiest rank {shown['balance']:.3f} times "
        f"the mean, {shown['text_frac']:.1%} text-only samples"
    )
    return "\n".join(lines) + "\n"


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Show the steps of a plan.")
    add_recipe(parser)
    parser.add_argument(
        "--manifest", type=Path, metavar="M.parquet", help="instead of the recipe's data.train"
    )
    parser.add_argument("--world-size", type=positive, default=1, metavar="W")
    parser.add_argument("--steps", type=positive, default=3, metavar="N")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    errors.command(main)()
