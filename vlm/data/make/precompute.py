"""Annotations and their media to shards, in processes, each of which writes whole shards.

Shard i of a kind holds annotations ``i * samples_per_shard`` and on of that kind, in their order,
under their line numbers as keys: so the bytes depend on no worker, and a second run can tell what
is done by the names that are there. A clip that fails leaves a gap, never moves its neighbours.

    OUTPUT/video-00000.tar  image-00000.tar  text-00000.tar    complete, or absent
    OUTPUT/failed.jsonl                what is in no shard, and why; may be empty
    OUTPUT/failed/video-00000.jsonl    the same of one shard, written before it

Not here: where annotations come from (`vlm.data.make.spool`), what runs the tasks (`vlm.data.pool`,
`vlm.data.make.cluster`), which frames (`vlm.data.format.frames`), the tar
(`vlm.data.format.shards`).
"""

import fcntl
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from vlm.data.format.frames import extract_frames
from vlm.data.format.image import load_image
from vlm.data.format.latents import encoder
from vlm.data.format.schema import MAX_FRAMES
from vlm.data.format.shards import ShardWriter, publish
from vlm.data.make import annotations
from vlm.data.make.annotations import KINDS, Annotation, Failure, Kind, Lines
from vlm.data.make.archives import MissingMediaError
from vlm.data.make.media import MediaReader
from vlm.data.make.spool import (
    ADAPTER_FAILURES_FILE,
    ANNOTATIONS_FILE,
    Source,
    read_failures,
    spool,
    write_failures,
)
from vlm.errors import ConfigError, DataError, SampleError

FAILED_FILE = "failed.jsonl"


@dataclass(frozen=True)
class Settings:
    """What the bytes of the shards depend on, besides annotations and media."""

    size: int = 224
    fps: float = 1.0
    max_frames: int = MAX_FRAMES
    samples_per_shard: int = 1000
    #: folder or Hugging Face id of an AutoencoderKL; None for no latents
    latents: str | None = None

    def __post_init__(self) -> None:
        if not 8 <= self.size <= 4096:
            raise ConfigError(f"size {self.size}: expected 8 to 4096 pixels")
        if not 0 < self.fps <= 1000:
            raise ConfigError(f"fps {self.fps}: expected more than 0, at most 1000")
        if not 1 <= self.max_frames <= MAX_FRAMES:
            raise ConfigError(f"max_frames {self.max_frames}: expected 1 to {MAX_FRAMES}")
        if not 1 <= self.samples_per_shard <= 1_000_000:
            raise ConfigError(f"samples_per_shard {self.samples_per_shard}: expected 1 to 1000000")


@dataclass(frozen=True)
class ShardTask:
    settings: Settings
    root: Path
    output: Path
    kind: Kind
    number: int
    lines: Lines

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.number:05d}"

    @property
    def is_done(self) -> bool:
        """Whether there is the shard, or the reason why there is none."""
        if (self.output / f"{self.name}.tar").exists():
            return True
        return sum(1 for _ in read_failures(self.failures_path)) == len(self.lines)

    @property
    def failures_path(self) -> Path:
        return self.output / "failed" / f"{self.name}.jsonl"


@dataclass(frozen=True)
class ShardReport:
    num_samples: int
    num_frames: int
    #: of the media that were read
    num_bytes: int


@dataclass(frozen=True)
class Report:
    """What became of a data set."""

    num_shards: int
    num_written: int
    #: samples of shards that were there before
    num_present: int
    #: samples of the other part of a split
    num_other_split: int
    num_frames: int
    num_bytes: int
    seconds: float
    #: what is in no shard, by reason
    failed: Counter[str]


#: runs a function over all tasks, anywhere, and gives the results in the order of the tasks
Engine = Callable[[Callable[[ShardTask], ShardReport], list[ShardTask]], Iterable[ShardReport]]


def run(
    source: Source,
    output: Path,
    settings: Settings,
    engine: Engine,
    progress: Callable[[int, int], None],
) -> Report:
    """Writes every shard that is not there yet.

    Args:
        progress: Called with (samples done, samples in all); these grow until all are known.

    Raises:
        ConfigError: there is no such autoencoder, or it does not fit the size.
        DataError: the data set is not there, or ``output`` holds shards made otherwise, or another
            run is writing there.
    """
    started = time.perf_counter()
    if settings.latents:
        encoder(settings.latents).check_size(settings.size)
    asked = source.fingerprint() | asdict(settings)
    with _locked(output):
        found = spool(source, asked, output, lambda n: progress(0, n))
        tasks = _tasks(source.root, output, settings)
        total = found.num_annotations
        todo = [task for task in tasks if not task.is_done]
        done = total - sum(len(task.lines) for task in todo)
        progress(done, total)
        written = []
        for task, shard in zip(todo, engine(write_shard, todo), strict=True):
            written.append(shard)
            done += len(task.lines)
            progress(done, total)
        failed = _join_failures(output, tasks)
    num_written = sum(shard.num_samples for shard in written)
    return Report(
        num_shards=sum((output / f"{task.name}.tar").exists() for task in tasks),
        num_written=num_written,
        num_present=total - failed.total() - num_written,
        num_other_split=found.num_other_split,
        num_frames=sum(shard.num_frames for shard in written),
        num_bytes=sum(shard.num_bytes for shard in written),
        seconds=time.perf_counter() - started,
        failed=failed + Counter(found.failed),
    )


def _join_failures(output: Path, tasks: list[ShardTask]) -> Counter[str]:
    """Writes all failures into one file; returns those of shards, by reason."""
    counts: Counter[str] = Counter()
    temporary = output / f".{FAILED_FILE}.tmp"
    with temporary.open("wb") as file:
        file.write((output / ADAPTER_FAILURES_FILE).read_bytes())
        for task in tasks:
            for failure in read_failures(task.failures_path):
                counts[failure.reason] += 1
                file.write(failure.model_dump_json().encode() + b"\n")
    publish(temporary, output / FAILED_FILE)
    return counts


def _tasks(root: Path, output: Path, settings: Settings) -> list[ShardTask]:
    lines = annotations.index(output / ANNOTATIONS_FILE)
    # whoever runs a task may have another working directory
    root, output = root.resolve(), output.resolve()
    return [
        ShardTask(settings, root, output, kind, number, chunk)
        for kind in KINDS
        for number, chunk in enumerate(lines[kind].chunks(settings.samples_per_shard))
    ]


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Keeps a second run out, and clears away what one that was killed left unfinished."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{output}: another run is writing there; wait until it ends") from None
        for path in [*output.glob(".*.tmp"), *output.glob("failed/.*.tmp")]:
            path.unlink()
        yield


def write_shard(task: ShardTask) -> ShardReport:
    """Writes one shard; if none of its samples can be made there is none."""
    failures: list[Failure] = []
    num_samples = num_frames = num_bytes = 0
    writer = ShardWriter(task.output, task.kind, task.settings.samples_per_shard, task.number)
    with (task.output / ANNOTATIONS_FILE).open("rb") as file, MediaReader(task.root) as media:
        with writer:
            for number, annotation in annotations.read(file, task.lines):
                try:
                    frames, size = _frames(task.settings, media, annotation)
                    latents = _latents(task.settings, frames)
                except SampleError as error:
                    failures.append(_failure(number, annotation, error))
                    continue
                writer.write(number, annotation.to_sample(len(frames)), frames, latents)
                num_samples += 1
                num_frames += len(frames)
                num_bytes += size
            # before the shard gets its name, or a crash in between would lose them
            write_failures(task.failures_path, failures)
    return ShardReport(num_samples, num_frames, num_bytes)


def _frames(
    settings: Settings, media: MediaReader, annotation: Annotation
) -> tuple[list[np.ndarray], int]:
    """The frames of an annotation, and how many bytes its media have."""
    if annotation.video is not None:
        with media.open(annotation.video) as file:
            frames = extract_frames(
                file, size=settings.size, fps=settings.fps, max_frames=settings.max_frames
            )
            return frames, file.seek(0, os.SEEK_END)
    frames, num_bytes = [], 0
    for ref in annotation.images:
        with media.open(ref) as file:
            frames.append(load_image(file, settings.size))
            num_bytes += file.seek(0, os.SEEK_END)
    return frames, num_bytes


def _latents(settings: Settings, frames: list[np.ndarray]) -> bytes | None:
    return encoder(settings.latents).encode(frames) if settings.latents and frames else None


def _failure(number: int, annotation: Annotation, error: SampleError) -> Failure:
    fault = "missing" if isinstance(error, MissingMediaError) else "undecodable"
    return Failure(
        line=number + 1,
        id=annotation.id,
        reason=f"{fault} {annotation.kind}",
        error=f"{annotation.video or ', '.join(annotation.images[:4])}: {error}",
    )
