"""Checks shards and names every fault: shard, key, member and what is wrong.

    python tools/validate_shards.py data/shards --manifest data/m.parquet --against data/eval
    python tools/validate_shards.py data/shards --tokenizer data/tokenizer --quarantine data/clean

Exit codes: 0 clean, 1 faults, 2 a mistake.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlm import errors
from vlm.arguments import add_shards, add_tokenizer, add_workers, positive, progress
from vlm.data.format import shards
from vlm.data.validation.check import Checks
from vlm.data.validation.page import write_page
from vlm.data.validation.quarantine import quarantine
from vlm.data.validation.report import ALLOWABLE, Report
from vlm.data.validation.validate import validate


def main(argv: Sequence[str]) -> int:
    args = _parse(argv)
    paths = shards.find_shards(args.paths)
    checks = Checks(
        decode_frac=args.decode,
        size=args.size,
        tokenizer=args.tokenizer,
        image_token=args.image_token,
        max_tokens=args.max_tokens,
        allowed=frozenset(args.allow),
    )
    with progress("shards") as advance:
        report = validate(
            paths,
            checks,
            manifest_path=args.manifest,
            against=args.against,
            workers=args.workers,
            progress=advance,
        )
    if args.json:
        sys.stdout.write(json.dumps(report.as_json()) + "\n")
    else:
        _show(report)
    if args.html is not None:
        write_page(args.html, report)
    if args.quarantine is not None:
        with progress("clean copies") as advance:
            found = quarantine(paths, report, args.quarantine, args.workers, advance)
        sys.stderr.write(
            f"{args.quarantine}: {found.num_samples:,} samples in {found.num_shards:,} shards, "
            f"{found.num_left_out:,} left out\n"
        )
    return errors.EXIT_FAULTS if report.faults else 0


def _show(report: Report) -> None:
    for fault in report.faults:
        parts = [part for part in (fault.shard, fault.key, fault.member, fault.fault) if part]
        # a name from a shard may hold anything, a terminal's control codes too
        sys.stdout.write(errors.one_line(": ".join(parts)) + "\n")
    console = Console()
    table = Table("shards", f"{report.num_shards:,}")
    table.add_row("faults", f"{len(report.faults):,}")
    for check, count in report.faults_by_check.items():
        table.add_row(f"  {check}", f"{count:,}")
    for check, count in report.num_allowed.items():
        table.add_row(f"  {check}, allowed", f"{count:,}")
    table.add_row("samples", f"{report.num_samples:,}")
    table.add_row("  with a fault", f"{report.num_faulty:,}")
    table.add_row("  decoded in full", f"{report.num_decoded:,}")
    table.add_row("MB", f"{report.num_bytes / 1e6:,.1f}")
    console.print(table)
    total = report.total.as_json()
    for title, name in Report.HISTOGRAMS.items():
        if any(total[name].values()):
            histogram = Table(title, "samples", "")
            largest = max(total[name].values())
            for label, count in total[name].items():
                histogram.add_row(label, f"{count:,}", "#" * round(40 * count / largest))
            console.print(histogram)
    sources = Table("source", "samples", "frames", "MB", "text tokens", "learned")
    for name, tally in sorted(report.sources.items()):
        learned = tally.supervised_frac
        sources.add_row(
            escape(errors.one_line(name)),
            f"{tally.num_samples:,}",
            f"{tally.num_frames:,}",
            f"{tally.num_bytes / 1e6:,.1f}",
            "-" if learned is None else f"{tally.num_tokens:,}",
            "-" if learned is None else f"{learned:.1%}",
        )
    console.print(sources)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check shards and name every fault.")
    add_shards(parser)
    parser.add_argument("--manifest", type=Path, metavar="M.parquet", help="what they must fit")
    parser.add_argument(
        "--against", type=Path, metavar="EVAL", help="evaluation shards, folder or manifest"
    )
    parser.add_argument(
        "--decode",
        type=_share,
        default=1.0,
        metavar="all|FRAC|none",
        help="share of the samples whose images and videos are decoded in full",
    )
    parser.add_argument(
        "--size", type=positive, help="frames are brought to this size, so others are no fault"
    )
    add_tokenizer(parser)
    parser.add_argument("--max-tokens", type=positive, metavar="N", help="of a sample's text")
    parser.add_argument(
        "--allow",
        choices=ALLOWABLE,
        action="append",
        default=[],
        help="count these and do not call them faults; repeatable",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--html", type=Path, metavar="FILE", help="the report as a page")
    parser.add_argument(
        "--quarantine", type=Path, metavar="FOLDER", help="copies without faulty samples"
    )
    add_workers(parser)
    return parser.parse_args(argv)


def _share(text: str) -> float:
    words = {"all": 1.0, "none": 0.0}
    try:
        share = words[text] if text in words else float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected all, none or a share like 0.1")
    return share


if __name__ == "__main__":
    errors.command(main)()
