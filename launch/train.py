"""Trains a recipe: deepspeed launch/train.py --ds_config ds_configs/zero2.json --recipe R.yaml

On a CPU with two ranks: deepspeed --num_gpus 2 launch/train.py ...
Checked without training: python launch/train.py --ds_config ... --recipe ... --dry-run
"""

from collections.abc import Sequence

from vlm import config, log
from vlm.engine import ds_config
from vlm.engine.cpu import on_cpu, prepare_cpu
from vlm.engine.setup import num_ranks, start_process
from vlm.errors import command
from vlm.train import arguments
from vlm.train.dry_run import dry_run
from vlm.train.loop import fit
from vlm.train.preempt import Preemption


def main(argv: Sequence[str]) -> int:
    args = arguments.parse(argv, (__doc__ or "").partition("\n")[0])
    log.setup()
    recipe = config.load(args.recipe, args.overrides)
    with Preemption(recipe.train.max_hours) as preemption:
        cpu = on_cpu()
        if cpu:
            prepare_cpu()
        resolved = ds_config.resolve(
            ds_config.load(args.ds_config),
            path=args.ds_config,
            recipe_path=args.recipe,
            micro_batches=recipe.data.micro_batches,
            world_size=num_ranks(),
            cpu=cpu,
        )
        if args.dry_run:
            return dry_run(recipe, resolved)
        machine = start_process(recipe.train.cpu_threads)
        return fit(recipe, resolved, machine, preemption)


if __name__ == "__main__":
    command(main)()
