"""Makes shards from videos and annotations.

    python tools/precompute.py video --annotations train.jsonl --output shards/train

Each line of the annotations is a JSON object: `id`, `source`, `video` (a path below --root; without
it the sample is text only), `turns` or `caption`, and `meta`. What cannot be used goes to
OUTPUT/failed.jsonl; a second run skips the shards that are there.

Exit codes: 0 done, 1 not a single sample, 2 a mistake.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from vlm import errors
from vlm.data import precompute


def main(argv: Sequence[str]) -> int:
    args = _parse(argv)
    settings = precompute.Settings(
        size=args.size,
        fps=args.fps,
        max_frames=args.max_frames,
        samples_per_shard=args.samples_per_shard,
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("samples", total=None)
        report = precompute.run(
            args.annotations,
            args.root or args.annotations.parent,
            args.output,
            settings,
            workers=args.workers,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    Console().print(_table(args.output, report))
    return 0 if report.num_written + report.num_present else errors.EXIT_FAULTS


def _table(output: Path, report: precompute.Report) -> Table:
    table = Table("shards", escape(str(output)))
    table.add_row("written", f"{report.num_written:,} samples, {report.num_frames:,} frames")
    table.add_row("there before", f"{report.num_present:,} samples")
    for reason, count in sorted(report.failed.items()):
        table.add_row(f"skipped: {reason}", f"{count:,}, see {precompute.FAILED_FILE}")
    table.add_row("seconds", f"{report.seconds:.1f}")
    table.add_row("MB/s of video", f"{report.num_bytes / 1e6 / report.seconds:.1f}")
    return table


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make shards from videos and annotations.")
    video = parser.add_subparsers(required=True).add_parser("video", help="videos and text")
    video.add_argument("--annotations", type=Path, required=True, metavar="X.jsonl")
    video.add_argument("--output", type=Path, required=True, metavar="DIR")
    video.add_argument("--root", type=Path, metavar="DIR", help="of videos; default: of X.jsonl")
    video.add_argument("--size", type=int, default=224, help="side of the frames in pixels")
    video.add_argument("--fps", type=float, default=1.0, help="frames a second of video")
    video.add_argument("--max-frames", type=int, default=64, help="more are spread evenly")
    video.add_argument("--samples-per-shard", type=int, default=1000)
    video.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    return parser.parse_args(argv)


if __name__ == "__main__":
    errors.command(main)()
