"""Merges, splits, sorts, shuffles and filters shards: samples move as bytes, none is decoded.

1. Headers of the input are scanned; JSON is read only where frames or sources decide.
2. An order of the samples is chosen and cut into shards: a function of input and options alone.
3. Shards are written, in processes, each under its name only when it is whole. A second run makes
   only those that are missing.

    OUTPUT/shard-00000.tar ...
    OUTPUT/reshard.json           what a second run must agree with

Not here: mending damaged shards (`vlm.data.validation`).
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from vlm.data.format import shards
from vlm.data.format.rewrite import END_MARKER, ShardCopy
from vlm.data.format.shard_index import Index, build_index
from vlm.data.pool import ordered_map
from vlm.errors import ConfigError, DataError

SETTINGS_FILE = "reshard.json"
NAME = "shard-{:05d}.tar"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is written besides the bytes of the samples."""

    #: None for no limit
    samples_per_shard: int | None = None
    #: of the whole file; a sample that is larger gets a shard of its own
    bytes_per_shard: int | None = None
    #: `frames` puts short samples first
    order: Literal["input", "frames", "shuffled"] = "input"
    seed: int = 0
    #: only samples of these; empty for all
    sources: tuple[str, ...] = ()
    #: numbers the samples anew, so that keys of several folders do not clash
    rename: bool = False

    def __post_init__(self) -> None:
        for name, limit in (
            ("samples_per_shard", self.samples_per_shard),
            ("bytes_per_shard", self.bytes_per_shard),
        ):
            if limit is not None and limit < 1:
                raise ConfigError(f"{name} {limit}: expected at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed {self.seed}: expected 0 or more")


@dataclass(frozen=True)
class Summary:
    num_samples: int
    #: of the input, by `sources`
    num_left_out: int
    num_bytes: int
    num_shards: int
    #: shards that were there before
    num_present: int


@dataclass(frozen=True)
class _Task:
    """One shard to write; entry i of each list is its sample i."""

    output: Path
    inputs: list[Path]
    shard: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    #: new key of the first sample; None to keep keys
    first_key: int | None


def reshard(
    paths: Sequence[Path],
    output: Path,
    options: Options,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Writes the samples of ``paths`` to shards in the folder ``output``.

    Args:
        progress: Called with (shards done, shards in all), of the input and of the output.

    Raises:
        DataError: a damaged shard, keys that clash, no sample, or ``output`` holds other shards.
    """
    index = build_index(paths, _needs_content(options), workers, progress)
    rows = _order(index, options)
    cuts = _cut(index.length[rows], options)
    tasks = [
        _task(index, rows[start:end], output / NAME.format(number), start, options.rename)
        for number, (start, end) in enumerate(pairwise(cuts))
    ]
    _check_settings(output, index, options)
    missing = [task for task in tasks if not _is_done(task)]
    for done, _ in enumerate(ordered_map(_write, missing, workers), 1):
        if progress is not None:
            progress(len(tasks) - len(missing) + done, len(tasks))
    return Summary(
        num_samples=len(rows),
        num_left_out=index.num_samples - len(rows),
        num_bytes=sum(task.output.stat().st_size for task in tasks),
        num_shards=len(tasks),
        num_present=len(tasks) - len(missing),
    )


def merge(
    paths: Sequence[Path],
    output: Path,
    rename: bool = False,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Writes the samples of ``paths``, in their order, to the one shard ``output``.

    Raises:
        DataError: a damaged shard, keys that clash, or ``output`` is there already.
    """
    if output.exists():
        raise DataError(f"{output}: is there already; delete it, or name another file")
    index = build_index(paths, False, workers, progress)
    rows = _order(index, Options(rename=rename))
    _write(_task(index, rows, output, 0, rename))
    return Summary(len(rows), 0, output.stat().st_size, num_shards=1, num_present=0)


def _needs_content(options: Options) -> bool:
    return options.order == "frames" or bool(options.sources)


def _order(index: Index, options: Options) -> np.ndarray:
    """Rows of the index as they are written, without those that are left out."""
    rows = np.arange(index.num_samples)
    if options.sources:
        if unknown := set(options.sources) - set(index.sources):
            known = ", ".join(sorted(index.sources)[:10])
            raise DataError(
                f"source {', '.join(sorted(unknown))}: no sample is of it; there is {known}"
            )
        chosen = [number for name, number in index.sources.items() if name in options.sources]
        rows = rows[np.isin(index.source, chosen)]
    if not options.rename:
        index.check_keys(rows)
    if options.order == "frames":
        return rows[np.argsort(index.num_frames[rows], kind="stable")]
    if options.order == "shuffled":
        return np.random.Generator(np.random.Philox(options.seed)).permutation(rows)
    return rows


def _cut(lengths: np.ndarray, options: Options) -> list[int]:
    """Where shards start in the order, and where the last one ends."""
    ends = np.cumsum(lengths, dtype=np.int64)
    room = None if options.bytes_per_shard is None else options.bytes_per_shard - len(END_MARKER)
    cuts = [0]
    while cuts[-1] < len(lengths):
        start = cuts[-1]
        end = len(lengths)
        if options.samples_per_shard is not None:
            end = min(end, start + options.samples_per_shard)
        if room is not None:
            limit = room + (int(ends[start - 1]) if start else 0)
            end = min(end, int(np.searchsorted(ends, limit, side="right")))
        cuts.append(max(end, start + 1))
    return cuts


def _task(index: Index, rows: np.ndarray, output: Path, start: int, rename: bool) -> _Task:
    used, shard = np.unique(index.shard[rows], return_inverse=True)
    return _Task(
        output=output,
        inputs=[index.paths[i] for i in used],
        shard=shard,
        offset=index.offset[rows],
        length=index.length[rows],
        first_key=start if rename else None,
    )


def _is_done(task: _Task) -> bool:
    if not task.output.exists():
        return False
    if task.first_key is None:
        expected = int(task.length.sum()) + len(END_MARKER)
        if (found := task.output.stat().st_size) != expected:
            raise DataError(
                f"{task.output}: has {found} bytes, expected {expected}; it has changed since it "
                "was written, delete it"
            )
    return True


def _write(task: _Task) -> None:
    with ShardCopy(task.output) as copy:
        if task.first_key is None:
            for path, offset, length in _joined(task):
                with shards.open_shard(path) as shard:
                    copy.copy(shard.read, offset, length, str(path))
            return
        ranges = zip(task.shard, task.offset.tolist(), task.length.tolist(), strict=True)
        for key, (row, offset, length) in enumerate(ranges, task.first_key):
            path = task.inputs[row]
            with shards.open_shard(path) as shard:
                copy.copy_sample(shard.read, offset, length, f"{key:08d}", str(path))


def _joined(task: _Task) -> Iterator[tuple[Path, int, int]]:
    """(shard, offset, length) of the samples, neighbours in one piece."""
    shard, offset, length = task.shard, task.offset, task.length
    follows = (shard[1:] == shard[:-1]) & (offset[1:] == offset[:-1] + length[:-1])
    starts = np.flatnonzero(np.append(True, ~follows))
    for start, end in pairwise([*starts.tolist(), len(shard)]):
        total = int(length[start:end].sum())
        yield task.inputs[shard[start]], int(offset[start]), total


def _check_settings(output: Path, index: Index, options: Options) -> None:
    """Remembers what the output is made of, and refuses another."""
    inputs = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in index.paths]
    made_of = {"version": 1, **asdict(options), "samples": index.fingerprint(), "inputs": inputs}
    raw = json.dumps(made_of, indent=1)
    path = output / SETTINGS_FILE
    if path.exists():
        if path.read_text(encoding="utf-8") != raw:
            raise DataError(
                f"{output}: holds shards made of other samples or with other options (see {path}); "
                "name an empty folder, or delete it"
            )
        return
    if output.exists() and next(output.glob("*.tar"), None) is not None:
        raise DataError(f"{output}: holds shards and no {SETTINGS_FILE}; name an empty folder")
    output.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(raw, encoding="utf-8")
    shards.publish(temporary, path)
