"""Writes an adapter's stream of annotations to a file once, so that shards can be made from it.

    OUTPUT/annotations.jsonl      one annotation a line; line numbers are keys of samples
    OUTPUT/failed/adapter.jsonl   what the adapter could not use, and why
    OUTPUT/precompute.json        what was asked for; written last, so the rest is then complete

Here samples are split by the image or video they are about and get their licence. Not here: the
shards (`vlm.data.make.precompute`).
"""

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from vlm.data.format.schema import MAX_JSON_BYTES
from vlm.data.format.shards import publish
from vlm.data.make.adapters.base import Adapter
from vlm.data.make.annotations import DELETE_IT, Annotation, Failure
from vlm.errors import ConfigError, DataError

ANNOTATIONS_FILE = "annotations.jsonl"
ADAPTER_FAILURES_FILE = "failed/adapter.jsonl"
SETTINGS_FILE = "precompute.json"
VERSION = 2
_REPORT_EVERY = 1000


@dataclass(frozen=True)
class Split:
    """Which samples are taken: all, or those of one of two parts."""

    part: Literal["all", "train", "val"] = "all"
    val_frac: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.part == "all" and self.val_frac:
            raise ConfigError(f"val_frac {self.val_frac} without a split; expected train or val")
        if self.part != "all" and not 0 < self.val_frac < 1:
            raise ConfigError(f"val_frac {self.val_frac}: expected more than 0 and less than 1")

    def takes(self, identity: str) -> bool:
        """Whether samples of this image or video belong here; depends on nothing else."""
        if self.part == "all":
            return True
        digest = hashlib.blake2b(f"{self.seed}\0{identity}".encode(), digest_size=8).digest()
        is_val = int.from_bytes(digest) < self.val_frac * 2**64
        return is_val == (self.part == "val")


@dataclass(frozen=True)
class Source:
    """Which annotations are wanted."""

    #: of the registry
    name: str
    adapter: Adapter
    #: folder that refs start from
    root: Path
    options: Any
    split: Split = Split()
    #: at most so many samples, the first ones; None for all
    max_samples: int | None = None

    def fingerprint(self) -> dict[str, Any]:
        """What a second run must agree with; files count by what they hold.

        Raises:
            DataError: the root, or a file among the options, is not there.
        """
        if not self.root.is_dir():
            raise DataError(f"{self.root} is no folder; expected the one with the data set")
        return {
            "adapter": self.name,
            "options": {k: _plain(v) for k, v in dataclasses.asdict(self.options).items()},
            "split": dataclasses.asdict(self.split),
            "max_samples": self.max_samples,
        }


@dataclass(frozen=True)
class Spooled:
    """What is in the file."""

    sha256: str
    num_annotations: int
    #: samples of the other part
    num_other_split: int
    #: what the adapter could not use, by reason
    failed: dict[str, int]


def spool(
    source: Source, asked: dict[str, Any], output: Path, progress: Callable[[int], None]
) -> Spooled:
    """Writes the annotations, unless a run that was asked the same did.

    Args:
        asked: What the shards depend on: the source's fingerprint and more.
        progress: Called with the number of annotations.

    Raises:
        DataError: ``output`` holds something else, or the data set is not there.
    """
    asked = {"version": VERSION} | asked
    if (output / SETTINGS_FILE).exists():
        return _check_spooled(output, asked)
    if any(output.glob("*.tar")):
        raise DataError(f"{output} holds shards but no {SETTINGS_FILE}; take another --output")
    # lazy: an adapter finds out here whether its data set is there, before there is an output
    stream = _peeked(source.adapter.annotations(source.root, source.options))
    (output / "failed").mkdir(parents=True, exist_ok=True)
    taken, failed = (
        (path, path.with_name(f".{path.name}.tmp"))
        for path in (output / ANNOTATIONS_FILE, output / ADAPTER_FAILURES_FILE)
    )
    with taken[1].open("wb") as annotations, failed[1].open("wb") as failures:
        counts = _write(source, stream, annotations, failures, progress)
    if not (counts.taken or counts.failed):
        raise DataError(f"{source.root}: {source.name} found no sample there; nothing is written")
    for path, temporary in (taken, failed):
        publish(temporary, path)
    spooled = Spooled(
        _sha256(output / ANNOTATIONS_FILE), counts.taken, counts.other_split, dict(counts.failed)
    )
    found = asked | dataclasses.asdict(spooled)
    write_text(output / SETTINGS_FILE, json.dumps(found, indent=1) + "\n")
    return spooled


@dataclass
class _Counts:
    taken: int
    other_split: int
    failed: Counter[str]


def _write(
    source: Source,
    stream: Iterable[Annotation | Failure],
    annotations: BinaryIO,
    failures: BinaryIO,
    progress: Callable[[int], None],
) -> _Counts:
    counts = _Counts(0, 0, Counter())

    def fail(failure: Failure) -> None:
        counts.failed[failure.reason] += 1
        failures.write(failure.model_dump_json().encode() + b"\n")

    for item in stream:
        if isinstance(item, Failure):
            fail(item)
            continue
        if not source.split.takes(item.split_identity):
            counts.other_split += 1
            continue
        if item.licence is None and source.adapter.licence:
            item = item.model_copy(update={"licence": source.adapter.licence})
        line = item.model_dump_json(exclude_defaults=True).encode() + b"\n"
        if len(line) > MAX_JSON_BYTES:
            error = f"{len(line)} bytes, at most {MAX_JSON_BYTES} are read"
            fail(Failure(reason="too long", error=error, id=item.id))
            continue
        annotations.write(line)
        counts.taken += 1
        if counts.taken % _REPORT_EVERY == 0:
            progress(counts.taken)
        if counts.taken == source.max_samples:
            break
    return counts


def _peeked(stream: Iterator[Annotation | Failure]) -> Iterator[Annotation | Failure]:
    first = next(stream, None)

    def whole() -> Iterator[Annotation | Failure]:
        if first is not None:
            yield first
            yield from stream

    return whole()


def _check_spooled(output: Path, asked: dict[str, Any]) -> Spooled:
    """What an earlier run spooled, if it was asked the same and nothing has changed since."""
    path = output / SETTINGS_FILE
    try:
        found = json.loads(path.read_text())
        spooled = Spooled(
            found["sha256"],
            found["num_annotations"],
            found["num_other_split"],
            dict(found["failed"]),
        )
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is none of ours; {DELETE_IT}") from None
    if names := [name for name, value in asked.items() if found.get(name) != value]:
        raise DataError(
            f"{output} holds shards made with other {', '.join(names)} (see {path}); expected the "
            "same, take another --output"
        )
    if _sha256(output / ANNOTATIONS_FILE) != spooled.sha256:
        raise DataError(f"{output / ANNOTATIONS_FILE} has changed since; {DELETE_IT}")
    return spooled


def _plain(value: Any) -> Any:
    """An option as JSON gives it back."""
    if isinstance(value, Path):
        return _sha256(value)
    return list(value) if isinstance(value, tuple) else value


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; expected a file") from None


def write_failures(path: Path, failures: Iterable[Failure]) -> None:
    """Writes them, or removes the file if there are none."""
    text = "".join(failure.model_dump_json() + "\n" for failure in failures)
    if text:
        write_text(path, text)
    else:
        path.unlink(missing_ok=True)


def read_failures(path: Path) -> Iterator[Failure]:
    """What ``write_failures`` wrote; nothing if there is no file."""
    if path.exists():
        with path.open("rb") as file:
            yield from map(Failure.model_validate_json, file)


def write_text(path: Path, text: str) -> None:
    """Replaces a file as a whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    publish(temporary, path)
