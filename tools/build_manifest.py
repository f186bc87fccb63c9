"""Builds the manifest of a set of shards: one Parquet row for every usable sample.

    python tools/build_manifest.py data/shards --tokenizer data/tokenizer --output data/m.parquet

Exit codes: 0 written, 2 a mistake or shards that cannot be used (nothing is written).
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from vlm import errors
from vlm.data import manifest, shards

MAX_SHOWN = 20


def main(argv: Sequence[str]) -> int:
    args = _parse(argv)
    paths = shards.find_shards(args.paths)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("shards", total=len(paths))
        summary = manifest.build(
            paths,
            args.tokenizer,
            args.image_token,
            args.output,
            workers=args.workers,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    for message in summary.rejected[:MAX_SHOWN]:
        sys.stderr.write(f"left out: {errors.one_line(errors.SampleError(message))}\n")
    if len(summary.rejected) > MAX_SHOWN:
        sys.stderr.write(f"and {len(summary.rejected) - MAX_SHOWN} more\n")
    table = Table("manifest", escape(str(args.output)))
    table.add_row("shards", f"{summary.num_shards:,}")
    table.add_row("samples", f"{summary.num_samples:,}")
    table.add_row("left out", f"{len(summary.rejected):,}")
    table.add_row("frames", f"{summary.num_frames:,}")
    table.add_row("text tokens", f"{summary.num_tokens:,}")
    table.add_row("answer tokens", f"{summary.num_answer_tokens:,}")
    table.add_row("fingerprint", summary.fingerprint[:16])
    Console().print(table)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build the manifest of a set of shards.")
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="a tar or a folder")
    parser.add_argument("--tokenizer", required=True, help="folder or Hugging Face id")
    parser.add_argument("--output", type=Path, required=True, metavar="M.parquet")
    parser.add_argument("--image-token", default="<|image|>")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    return parser.parse_args(argv)


if __name__ == "__main__":
    errors.command(main)()
