"""Splits, joins, sorts, shuffles and filters shards: samples move as bytes into a new folder.

    python tools/reshard.py data/in --output data/out --samples-per-shard 1000 --order shuffled
    python tools/reshard.py data/in --output data/short --order frames --source openvid

A run that was interrupted goes on where it stopped. Exit codes: 0 written, 2 a mistake or shards
that cannot be read.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vlm import errors
from vlm.arguments import add_rename, add_shards, add_workers, count, positive, progress
from vlm.data.format import shards
from vlm.data.make import reshard


def main(argv: Sequence[str]) -> int:
    args = _parse(argv)
    options = reshard.Options(
        samples_per_shard=args.samples_per_shard,
        bytes_per_shard=None if args.mb_per_shard is None else args.mb_per_shard * 1_000_000,
        order=args.order,
        seed=args.seed,
        sources=tuple(args.source),
        rename=args.rename,
    )
    with progress("shards") as advance:
        paths = shards.find_shards(args.paths)
        found = reshard.reshard(paths, args.output, options, args.workers, advance)
    sys.stdout.write(
        f"{args.output}: {found.num_samples:,} samples in {found.num_shards:,} shards "
        f"({found.num_present:,} were there), {found.num_left_out:,} left out, "
        f"{found.num_bytes / 1e6:,.1f} MB\n"
    )
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Split, join, sort, shuffle and filter shards.")
    add_shards(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--samples-per-shard", type=positive, metavar="N")
    parser.add_argument("--mb-per-shard", type=positive, metavar="MB", help="megabytes, of 1e6")
    parser.add_argument("--order", choices=("input", "frames", "shuffled"), default="input")
    parser.add_argument("--seed", type=count, default=0, help="of --order shuffled")
    parser.add_argument(
        "--source", action="append", default=[], metavar="NAME", help="only these; repeatable"
    )
    add_rename(parser)
    add_workers(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    errors.command(main)()
