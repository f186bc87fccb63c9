"""Joins shards into one, in the order of their paths.

    python tools/merge_shards.py data/a data/b --output data/all.tar --rename

Samples move as bytes. Exit codes: 0 written, 2 a mistake or shards that cannot be read.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vlm import errors
from vlm.arguments import add_rename, add_shards, add_workers, progress
from vlm.data.format import shards
from vlm.data.make import reshard


def main(argv: Sequence[str]) -> int:
    args = _parse(argv)
    with progress("shards") as advance:
        found = reshard.merge(
            shards.find_shards(args.paths),
            args.output,
            rename=args.rename,
            workers=args.workers,
            progress=advance,
        )
    megabytes = found.num_bytes / 1e6
    sys.stdout.write(f"{args.output}: {found.num_samples:,} samples, {megabytes:,.1f} MB\n")
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Join shards into one.")
    add_shards(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.tar")
    add_rename(parser)
    add_workers(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    errors.command(main)()
