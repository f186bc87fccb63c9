"""Makes shards from a data set as it is published, or from your own files and text.

    python tools/precompute.py video --annotations train.jsonl --output shards/train
    python tools/precompute.py openvid --root data/openvid --output shards/openvid \
        --split train --val-frac 0.01 --seed 0
    python tools/precompute.py eval --candidates cauldron=val-cauldron.parquet ... \
        --training train.parquet --output shards/val_10k

Every sub-command but eval is a data set with its own options. What cannot be used goes
to OUTPUT/failed.jsonl; a second run skips the shards that are there and makes the others.

Exit codes: 0 done, 1 not a single sample, 2 a mistake.
"""

import argparse
import dataclasses
import functools
import typing
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlm import arguments, errors
from vlm.data.make import download, precompute
from vlm.data.make.adapters.registry import ADAPTERS
from vlm.data.make.cluster import ray_map
from vlm.data.make.spool import Source, Split
from vlm.data.pool import ordered_map


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    return args.run(args)


def _make_shards(args: argparse.Namespace) -> int:
    if args.ray_address and args.engine != "ray":
        raise errors.ConfigError("--ray-address is of --engine ray; add it, or take this away")
    source = _source(args)
    settings = precompute.Settings(
        size=args.size,
        fps=args.fps,
        max_frames=args.max_frames,
        samples_per_shard=args.samples_per_shard,
        latents=args.latents,
    )
    if args.download:
        with arguments.progress("files") as advance:
            counts = download.fetch(
                source.adapter,
                source.root,
                args.download_files,
                lambda counts: advance(counts.total(), counts.total()),
            )
        Console().print(_counts("files", source.root, counts))
    engine = (
        functools.partial(ray_map, address=args.ray_address, workers=args.workers)
        if args.engine == "ray"
        else functools.partial(ordered_map, workers=args.workers)
    )
    with arguments.progress("samples") as progress:
        report = precompute.run(source, args.output, settings, engine, progress)
    Console().print(_table(args.output, report))
    return 0 if report.num_written + report.num_present else errors.EXIT_FAULTS


def _draw_mix(args: argparse.Namespace) -> int:
    # brings transformers, which every worker of the other commands would load again
    from vlm.data.make.adapters import eval_mix

    candidates: dict[str, list[Path]] = {}
    for given in args.candidates:
        name, _, path = given.partition("=")
        candidates.setdefault(name, []).append(Path(path))
    with arguments.progress("shards") as progress:
        report = eval_mix.publish(
            candidates,
            args.training,
            args.output,
            num_samples=args.num_samples or eval_mix.NUM_SAMPLES,
            seed=args.seed,
            samples_per_shard=args.samples_per_shard,
            workers=args.workers,
            progress=progress,
        )
    title = "drawn" if report.is_new else "checked, as it was drawn"
    table = Table(title, "samples", "left out: trained on", "left out: twice")
    for part in report.parts:
        counts = (part.num_samples, part.num_leaks, part.num_doubles)
        table.add_row(part.name, *(f"{count:,}" for count in counts))
    Console().print(table)
    Console().print(f"none of them among {report.num_trained:,} samples that are trained on")
    return 0


def _source(args: argparse.Namespace) -> Source:
    adapter = ADAPTERS[args.adapter]
    fields = dataclasses.fields(adapter.options)
    options = {field.name: vars(args)[f"option_{field.name}"] for field in fields}
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    files = [value for value in options.values() if isinstance(value, Path)]
    if args.root is None and not files:
        raise errors.ConfigError(f"{args.adapter} needs --root, the folder with the data set")
    return Source(
        name=args.adapter,
        adapter=adapter,
        root=args.root or files[0].parent,
        options=adapter.options(**options),
        split=Split(args.split, args.val_frac, args.seed),
        max_samples=args.max_samples,
    )


def _counts(title: str, where: Path, counts: Counter[str]) -> Table:
    table = Table(title, escape(str(where)))
    for name, count in sorted(counts.items()):
        table.add_row(escape(name), f"{count:,}")
    return table


def _table(output: Path, report: precompute.Report) -> Table:
    table = Table("shards", escape(str(output)))
    table.add_row("written", f"{report.num_written:,} samples, {report.num_frames:,} frames")
    table.add_row("there before", f"{report.num_present:,} samples")
    if report.num_other_split:
        table.add_row("of the other split", f"{report.num_other_split:,} samples")
    for reason, count in sorted(report.failed.items()):
        table.add_row(f"skipped: {escape(reason)}", f"{count:,}, see {precompute.FAILED_FILE}")
    table.add_row("seconds", f"{report.seconds:.1f}")
    table.add_row("MB/s of media", f"{report.num_bytes / 1e6 / report.seconds:.1f}")
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make shards from data sets.")
    commands = parser.add_subparsers(dest="adapter", required=True, metavar="DATA_SET")
    for name, adapter in ADAPTERS.items():
        command = commands.add_parser(name, help=adapter.help)
        for field in dataclasses.fields(adapter.options):
            hint = typing.get_type_hints(adapter.options)[field.name]
            _add_option(command, field, hint)
        _add_shared(command)
        command.set_defaults(run=_make_shards)
    _add_mix(commands.add_parser("eval", help="the frozen evaluation mix, out of held-out shards"))
    return parser


def _add_mix(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=_draw_mix)
    command.add_argument(
        "--candidates",
        nargs="+",
        required=True,
        metavar="SOURCE=MANIFEST",
        help="of held-out shards, for each source of the mix",
    )
    command.add_argument(
        "--training",
        type=Path,
        nargs="+",
        required=True,
        metavar="MANIFEST",
        help="of everything that is trained on",
    )
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="of shards")
    command.add_argument("--num-samples", type=arguments.positive, help="default: 10,000")
    command.add_argument("--seed", type=arguments.count, default=0, help="of the draw")
    command.add_argument("--samples-per-shard", type=arguments.positive, default=1000)
    arguments.add_workers(command)


def _add_option(command: argparse.ArgumentParser, field: dataclasses.Field, hint: Any) -> None:
    """The flag of one field of an adapter's options, see ``vlm.data.make.adapters.base.option``."""
    kinds = [kind for kind in typing.get_args(hint) if kind not in (type(None), Ellipsis)]
    is_required = field.default is dataclasses.MISSING
    command.add_argument(
        f"--{field.name.replace('_', '-')}",
        dest=f"option_{field.name}",
        type=kinds[0] if kinds else hint,
        nargs="+" if typing.get_origin(hint) is tuple else None,
        required=is_required,
        default=None if is_required else field.default,
        choices=field.metadata["choices"] or None,
        help=field.metadata["help"],
    )


def _add_shared(command: argparse.ArgumentParser) -> None:
    command.add_argument("--root", type=Path, metavar="DIR", help="folder with the data set")
    command.add_argument("--download", action="store_true", help="fetch what is not in --root")
    command.add_argument(
        "--download-files",
        nargs="+",
        default=(),
        metavar="GLOB",
        help="only these of the repository",
    )
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="of shards")
    command.add_argument("--size", type=int, default=224, help="side of the frames in pixels")
    command.add_argument("--fps", type=float, default=1.0, help="frames a second of video")
    command.add_argument("--max-frames", type=int, default=64, help="more are spread evenly")
    command.add_argument(
        "--latents", metavar="REPO_OR_PATH", help="also latents of frames, by this AutoencoderKL"
    )
    command.add_argument("--samples-per-shard", type=int, default=1000)
    command.add_argument("--max-samples", type=arguments.positive, help="only the first ones")
    command.add_argument(
        "--split", choices=("all", "train", "val"), default="all", help="by image or video"
    )
    command.add_argument("--val-frac", type=float, default=0.0, help="share of images or videos")
    command.add_argument("--seed", type=int, default=0, help="of the split")
    arguments.add_workers(command)
    command.add_argument("--engine", choices=("processes", "ray"), default="processes")
    command.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="of a cluster, or auto; without one Ray starts here",
    )


if __name__ == "__main__":
    errors.command(main)()
