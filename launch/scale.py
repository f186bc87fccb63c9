"""What 1, 2, 8, 64 nodes would give, on paper: python launch/scale.py --recipe R --ds_config D

    python launch/scale.py --recipe recipes/sizes/fvlm_1.7b_stage1.yaml \\
        --ds_config ds_configs/zero2.json --gpu a100-80gb --price 1.9

Each rank runs --micro_batches of a step, so more nodes need fewer steps for the same samples and
make larger ones. docs/scale.md has the formulas and
says which constants are assumed. Exit codes: 0 shown, 2 a mistake in the recipe or command.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vlm import config, gpus
from vlm.arguments import add_recipe, positive, progress
from vlm.engine import ds_config
from vlm.engine.cpu import prepare_cpu
from vlm.errors import command
from vlm.estimate.estimate import estimate
from vlm.estimate.fits import Hardware
from vlm.estimate.scale import Machines, Scaled, Work, scale
from vlm.train import data

COLUMNS = (
    "nodes,GPUs,ZeRO,fits,sent,sending,step,busy,checkpoint,MTBF,save every,lost,steps,hours,price"
)


def main(argv: Sequence[str]) -> int:
    args = _parse(argv)
    prepare_cpu()  # DeepSpeed is asked for the keys it knows, never for a GPU
    rows = []
    machines = Machines(
        gpus_per_node=args.gpus_per_node,
        node_gbit=args.node_gbit,
        gpu_gbit=args.gpu_gbit,
        link_frac=args.link_frac,
        volume_mb_s=args.volume_mb_s,
        gpu_mtbf_hours=args.gpu_mtbf_hours,
        price=args.price,
    )
    for nodes in args.nodes:
        work, fits = _work(args, nodes)
        rows += [(f"zero{s}", fits[f"zero{s}"], scale(s, work, machines, nodes)) for s in (1, 2, 3)]
    if args.json:
        found = [{"stage": name, "fits": fits, **dataclasses.asdict(r)} for name, fits, r in rows]
        sys.stdout.write(json.dumps(found) + "\n")
        return 0
    table = Table(*COLUMNS.split(","), box=None)
    for name, fit, row in rows:
        table.add_row(*_cells(name, fit, row))
    Console(file=sys.stdout, width=150, highlight=False).print(table)
    return 0


def _work(args: argparse.Namespace, nodes: int) -> tuple[Work, dict[str, bool]]:
    """Of one rank, and which stages fit into its GPU."""
    num_gpus = nodes * args.gpus_per_node
    batches = f"data.micro_batches={num_gpus * args.micro_batches}"
    planned = config.load(args.recipe, args.overrides)
    recipe = config.load(args.recipe, [*args.overrides, batches])
    hardware = Hardware(gpus.find(args.gpu), nodes, args.gpus_per_node, args.mfu, args.price)
    resolved = ds_config.resolve(
        ds_config.load(args.ds_config),
        path=args.ds_config,
        recipe_path=args.recipe,
        micro_batches=recipe.data.micro_batches,
        world_size=num_gpus,
        cpu=False,
    )
    vocab = args.vocab_size or len(data.load_tokenizer(recipe))
    with progress(f"steps of the plan, {nodes} nodes") as advance:
        found = estimate(recipe, resolved, vocab, hardware, advance)
    work = Work(
        num_trainable=found.num_trainable,
        num_parameters=found.num_parameters,
        compute_s=found.step_s,
        micro_batches=args.micro_batches,
        bucket=int(resolved["zero_optimization"].get("reduce_bucket_size", 5e8)),
        all_micro_batches=planned.train.steps * planned.data.micro_batches,
    )
    return work, {name: fit.fits for name, fit in found.fits.items()}


def _cells(name: str, fits: bool, row: Scaled) -> list[str]:
    price = "" if row.price is None else f"{row.price:,.0f}"
    return [
        *(str(row.nodes), str(row.num_gpus), name, "yes" if fits else "no"),
        *(f"{row.sent_bytes / 1e9:.2f} GB", f"{row.sending_s:.3f} s", f"{row.step_s:.2f} s"),
        *(f"{row.busy_frac:.0%}", f"{row.checkpoint_bytes / 1e9:.1f} GB {row.checkpoint_s:.0f} s"),
        *(f"{row.mtbf_hours:,.0f} h", f"{row.interval_s / 60:.0f} min", f"{row.lost_frac:.2%}"),
        *(f"{row.num_steps:,}", f"{row.hours:.2f}", price),
    ]


def _counts(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add_recipe(parser)
    add("--ds_config", type=Path, required=True, help="a file of ds_configs/")
    add("--gpu", required=True, help=f"one of {', '.join(gpus.GPUS)}")
    add("--nodes", type=_counts, default=[1, 2, 8, 64], help="(default: 1,2,8,64)")
    add("--gpus_per_node", type=positive, default=8)
    add("--micro_batches", type=positive, default=2, help="of each rank in a step (default: 2)")
    add("--mfu", type=float, default=0.4, help="share of the peak that is reached")
    add("--node_gbit", type=float, default=1600.0, help="of a node to the others (default: 1600)")
    add("--gpu_gbit", type=float, default=2400.0, help="of a GPU in its node (default: 2400)")
    add("--link_frac", type=float, default=0.7, help="of either that is reached (default: 0.7)")
    add("--volume_mb_s", type=float, default=300.0, help="of checkpoints' volume (default: 300)")
    add("--gpu_mtbf_hours", type=float, default=50_000.0, help="(default: 50000)")
    add("--price", type=float, help="of one GPU hour")
    add("--vocab_size", type=positive, help="default: the recipe's tokenizer is asked")
    add("--json", action="store_true", help="bytes and seconds")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    command(main)()
