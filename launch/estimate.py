"""Memory, time and price of a recipe before GPUs are rented: no weights, no GPU, no data read.

    python launch/estimate.py --recipe recipes/quickstart.yaml --ds_config ds_configs/zero2.json \\
        --gpu a100-80gb --nodes 1 --gpus_per_node 2 --price 1.9

Memory is that of the heaviest micro-batch of all steps, for every ZeRO stage. Time assumes
that executed operations run at --mfu of the GPU's published bf16 peak, and that nothing waits for
data; evaluation, checkpoints and start-up come on top.

Exit codes: 0 shown (whether it fits or not), 2 a mistake in the recipe or command.
"""

import argparse
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
from vlm.errors import ConfigError, command
from vlm.estimate.estimate import Estimate, as_dict, estimate
from vlm.estimate.fits import Fit, Hardware
from vlm.train import data

COLUMNS = (
    "weights",
    "gradients",
    "optimizer",
    "buckets",
    "activations",
    "logits",
    "frames",
    "reserved",
    "total",
    "host",
)


def main(argv: Sequence[str]) -> int:
    args = _parse(argv)
    prepare_cpu()  # DeepSpeed is asked for the keys it knows, never for a GPU
    recipe = config.load(args.recipe, args.overrides)
    price = recipe.log.gpu_price_per_hour if args.price is None else args.price
    if not 0 < args.mfu <= 1:
        raise ConfigError(f"--mfu: found {args.mfu:g}, expected a share of the peak, 0 to 1")
    hardware = Hardware(gpus.find(args.gpu), args.nodes, args.gpus_per_node, args.mfu, price)
    resolved = ds_config.resolve(
        ds_config.load(args.ds_config),
        path=args.ds_config,
        recipe_path=args.recipe,
        micro_batches=recipe.data.micro_batches,
        world_size=hardware.num_gpus,
        cpu=False,
    )
    with progress("steps of the plan") as advance:
        found = estimate(recipe, resolved, len(data.load_tokenizer(recipe)), hardware, advance)
    if args.json:
        sys.stdout.write(json.dumps(as_dict(found)) + "\n")
    else:
        _show(found, hardware, args.gpu)
    return 0


def _show(found: Estimate, hardware: Hardware, gpu: str) -> None:
    console = Console(file=sys.stdout, width=130, highlight=False)
    table = Table("GiB per GPU", *COLUMNS, f"fits {hardware.gpu.memory_gib:.0f}")
    for name, fit in found.fits.items():
        mark = "*" if name == found.chosen else ""
        table.add_row(name + mark, *_gib(fit), "yes" if fit.fits else "no")
    console.print(table)
    worst = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in found.worst.items())
    money = "" if found.price is None else f", {found.price:,.2f} at {hardware.price:g} a GPU hour"
    lines = [
        f"{found.source}",
        f"worst micro-batch: {worst}; host: GiB of each node; *: the file given; zero0 is in fp32",
        f"{found.num_parameters:,} parameters, {found.num_trainable:,} train",
        found.advice,
        f"a step: {found.model_flops:.3g} operations needed, {found.hardware_flops:.3g} executed "
        f"over {hardware.num_gpus} x {gpu}",
        f"{found.step_s:.3g} s a step, {found.hours:.3g} h for {found.num_steps} steps{money}; "
        f"assumed: {hardware.mfu:.0%} of {hardware.gpu.peak_flops / 1e12:g} TFLOP/s, no waiting",
    ]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)


def _gib(fit: Fit) -> list[str]:
    sizes = [vars(fit)[name] / 2**30 for name in COLUMNS]
    return [f"{size:.2f}" if size < 10 else f"{size:.1f}" for size in sizes]


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_recipe(parser)
    parser.add_argument("--ds_config", type=Path, required=True, help="a file of ds_configs/")
    parser.add_argument("--gpu", required=True, help=f"one of {', '.join(gpus.GPUS)}")
    parser.add_argument("--nodes", type=positive, default=1)
    parser.add_argument("--gpus_per_node", type=positive, default=8)
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that is reached")
    parser.add_argument("--price", type=float, help="of one GPU hour; else log.gpu_price_per_hour")
    parser.add_argument("--json", action="store_true", help="one JSON object, bytes and seconds")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    command(main)()
