"""Builds the manifest of a set of shards: one Parquet row for every usable sample.

    python tools/build_manifest.py data/shards --tokenizer data/tokenizer --output data/m.parquet

Shards of other tools need the size that frames are brought to:

    python tools/build_manifest.py laion/ --tokenizer T --output laion.parquet --size 224 \
        --source laion

Remote shards are read where they lie, and stay there:

    python tools/build_manifest.py s3://bucket/shards --tokenizer T --output m.parquet

Shards that have not changed since the last build, or since one that was killed, are not read
again; what is known of them lies in OUTPUT.parts, which may be deleted.

Exit codes: 0 written, 2 a mistake or shards that cannot be used (nothing is written).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlm import arguments, errors
from vlm.data.format.decode import DEFAULT_SAMPLING, Sampling
from vlm.data.format.foreign import DEFAULT_SOURCE
from vlm.data.manifest import manifest
from vlm.data.manifest.manifest_tally import Summary
from vlm.data.storage import locations

MAX_SHOWN = 20


def main(argv: Sequence[str]) -> int:
    args = _parse(argv)
    paths = locations.find_shards(args.paths)
    with arguments.progress("shards") as advance:
        summary = manifest.build(
            paths,
            args.tokenizer,
            args.image_token,
            args.output,
            workers=args.workers,
            progress=advance,
            size=args.size,
            sampling=Sampling(args.fps, args.max_frames),
            default_source=args.source,
            max_rejected_frac=args.max_rejected_frac,
            location=args.location,
        )
    for message in summary.rejected[:MAX_SHOWN]:
        sys.stderr.write(f"left out: {errors.one_line(message)}\n")
    if len(summary.rejected) > MAX_SHOWN:
        sys.stderr.write(f"and {len(summary.rejected) - MAX_SHOWN} more\n")
    Console().print(_table(args.output, summary))
    return 0


def _table(output: Path, summary: Summary) -> Table:
    table = Table("manifest", escape(str(output)))
    table.add_row("shards", f"{summary.num_shards:,} ({summary.num_read:,} read)")
    table.add_row("samples", f"{summary.num_samples:,}")
    for form, count in summary.forms.items():
        table.add_row(f"  {form}", f"{count:,}")
    for source in summary.sources[:MAX_SHOWN]:
        licences = ", ".join(source.licences) or "no licence named"
        table.add_row(
            _cell(f"  source {source.name}"), _cell(f"{source.num_samples:,}: {licences}")
        )
    table.add_row("left out", f"{len(summary.rejected):,}")
    table.add_row("frames", f"{summary.num_frames:,}")
    table.add_row("text tokens", f"{summary.num_tokens:,}")
    table.add_row("answer tokens", f"{summary.num_answer_tokens:,}")
    table.add_row("bytes a sample", f"{output.stat().st_size / summary.num_samples:.1f}")
    table.add_row("fingerprint", summary.fingerprint[:16])
    return table


def _cell(text: str) -> str:
    """Text of a shard as one harmless line."""
    return escape(errors.one_line(text))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build the manifest of a set of shards.")
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="a tar or a folder of them, or the URL of one at s3://, hf:// or https://",
    )
    arguments.add_tokenizer(parser, required=True)
    parser.add_argument("--output", type=Path, required=True, metavar="M.parquet")
    arguments.add_workers(parser)
    parser.add_argument(
        "--size",
        type=int,
        help="side of the square that frames are scaled and cropped to when they are read "
        "(default: all are taken as they are stored)",
    )
    parser.add_argument(
        "--fps",
        type=float,
        default=DEFAULT_SAMPLING.fps,
        help="frames a second taken of video files (default: %(default)s)",
    )
    parser.add_argument(
        "--max-frames",
        type=int,
        default=DEFAULT_SAMPLING.max_frames,
        help="of a longer video file, so many over its whole length (default: %(default)s)",
    )
    parser.add_argument(
        "--source",
        default=DEFAULT_SOURCE,
        help="source of samples that name none (default: %(default)s)",
    )
    parser.add_argument(
        "--max-rejected-frac",
        type=float,
        default=manifest.MAX_REJECTED_FRAC,
        metavar="FRAC",
        help="share of samples that may be left out (default: %(default)s)",
    )
    parser.add_argument(
        "--location",
        metavar="URL",
        help="folder at s3://, hf:// or http(s):// that training reads the shards from "
        "(default: where they are)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    errors.command(main)()
