"""Checks shards and names every fault: shard, key, member and what is wrong.

    python tools/validate_shards.py data/shards --manifest data/m.parquet

Exit codes: 0 clean, 1 faults, 2 a mistake.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vlm import errors
from vlm.data import shards, validate


def main(argv: Sequence[str]) -> int:
    args = _parse(argv)
    paths = shards.find_shards(args.paths)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("shards", total=len(paths))
        report = validate.validate(
            paths,
            manifest_path=args.manifest,
            decode=args.sample,
            workers=args.workers,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if args.json:
        clean = not report.faults
        sys.stdout.write(json.dumps({"clean": clean, **asdict(report)}) + "\n")
    else:
        _show(report)
    return errors.EXIT_FAULTS if report.faults else 0


def _show(report: validate.Report) -> None:
    for fault in report.faults:
        parts = [part for part in (fault.shard, fault.key, fault.member, fault.fault) if part]
        # a name from a shard may hold anything, a terminal's control codes too
        sys.stdout.write(errors.one_line(errors.DataError(": ".join(parts))) + "\n")
    table = Table("shards", f"{report.num_shards:,}")
    table.add_row("faults", f"{len(report.faults):,}")
    table.add_row("samples", f"{report.num_samples:,}")
    for kind, count in report.kinds.items():
        table.add_row(f"of kind {kind}", f"{count:,}")
    table.add_row("frames", f"{report.num_frames:,}")
    for bucket, count in report.frame_buckets.items():
        table.add_row(f"samples of {bucket} frames", f"{count:,}")
    for size, count in report.sizes.items():
        table.add_row(f"samples decoded at {size}", f"{count:,}")
    table.add_row("MB", f"{report.num_bytes / 1e6:,.1f}")
    Console().print(table)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check shards and name every fault.")
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="a tar or a folder")
    parser.add_argument("--manifest", type=Path, metavar="M.parquet")
    parser.add_argument(
        "--sample", type=_positive, metavar="N", help="decode the frames of N samples a shard only"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--workers", type=_positive, default=os.cpu_count() or 1)
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if (value := int(text)) <= 0:
        raise ValueError
    return value


if __name__ == "__main__":
    errors.command(main)()
