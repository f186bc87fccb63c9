"""Annotations and videos to shards, in processes, each of which writes whole shards.

Shard i of a kind holds annotations ``i * samples_per_shard`` and on of that kind, in their order,
under their line numbers as keys: so the bytes depend on no worker, and a second run can tell what
is done by the names that are there. A clip that fails leaves a gap, never moves its neighbours.

    OUTPUT/video-00000.tar  OUTPUT/text-00000.tar    complete, or absent
    OUTPUT/failed.jsonl                              every annotation that is in no shard, and why
    OUTPUT/failed/video-00000.jsonl                  the same of one shard, written before it
    OUTPUT/precompute.json                           what a second run must agree with

Not here: which frames (`vlm.data.frames`), the tar (`vlm.data.shards`).
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from vlm.data import annotations
from vlm.data.annotations import Annotation, Failure, Line
from vlm.data.frames import extract_frames
from vlm.data.pool import ordered_map
from vlm.data.schema import MAX_FRAMES
from vlm.data.shards import ShardWriter, publish
from vlm.errors import ConfigError, DataError, SampleError

SETTINGS_FILE = "precompute.json"
FAILED_FILE = "failed.jsonl"


@dataclass(frozen=True)
class Settings:
    """What the bytes of the shards depend on, besides annotations and videos."""

    size: int = 224
    fps: float = 1.0
    max_frames: int = MAX_FRAMES
    samples_per_shard: int = 1000

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
    annotations: Path
    root: Path
    output: Path
    kind: Literal["video", "text"]
    number: int
    lines: list[Line]

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.number:05d}"

    @property
    def is_done(self) -> bool:
        return (self.output / f"{self.name}.tar").exists()

    @property
    def failures_path(self) -> Path:
        return self.output / "failed" / f"{self.name}.jsonl"


@dataclass(frozen=True)
class ShardReport:
    num_samples: int
    num_frames: int
    #: of the videos that were read
    num_bytes: int


@dataclass(frozen=True)
class Report:
    """What became of an annotation file."""

    num_shards: int
    num_written: int
    #: samples of shards that were there before
    num_present: int
    num_frames: int
    num_bytes: int
    seconds: float
    #: annotations that are in no shard, by reason
    failed: Counter[str]


def run(
    annotation_path: Path,
    root: Path,
    output: Path,
    settings: Settings,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Writes every shard that is not there yet.

    Args:
        root: Folder that the annotations' video paths start from.
        progress: Called with (samples done, samples in all).

    Raises:
        DataError: the annotations cannot be read, or ``output`` holds shards made otherwise.
    """
    started = time.perf_counter()
    index = annotations.index(annotation_path)
    _check_settings(output, settings, index.sha256)
    tasks = [
        ShardTask(settings, annotation_path, root, output, kind, number, lines)
        for kind, all_lines in index.by_kind()
        for number, lines in enumerate(_chunks(all_lines, settings.samples_per_shard))
    ]
    total = len(index.video) + len(index.text)
    todo = [task for task in tasks if not task.is_done]
    done = total - sum(len(task.lines) for task in todo)
    if progress is not None:
        progress(done, total)
    written = []
    for task, shard in zip(todo, ordered_map(write_shard, todo, workers), strict=True):
        written.append(shard)
        done += len(task.lines)
        if progress is not None:
            progress(done, total)
    failures = index.failures + [f for task in tasks for f in _read_failures(task)]
    failures.sort(key=lambda failure: failure.line)
    _write_failures(output / FAILED_FILE, failures)
    num_written = sum(shard.num_samples for shard in written)
    return Report(
        num_shards=len(tasks),
        num_written=num_written,
        num_present=total + len(index.failures) - len(failures) - num_written,
        num_frames=sum(shard.num_frames for shard in written),
        num_bytes=sum(shard.num_bytes for shard in written),
        seconds=time.perf_counter() - started,
        failed=Counter(failure.reason for failure in failures),
    )


def write_shard(task: ShardTask) -> ShardReport:
    """Writes one shard; if none of its samples can be made there is none."""
    failures: list[Failure] = []
    num_samples = num_frames = num_bytes = 0
    writer = ShardWriter(task.output, task.kind, task.settings.samples_per_shard, task.number)
    with task.annotations.open("rb") as file, writer:
        for line in task.lines:
            annotation = annotations.read(file, line)
            try:
                frames, size = _frames(task, annotation)
            except (SampleError, OSError) as error:
                failures.append(_failure(line, annotation, error))
                continue
            writer.write(line.number, annotation.to_sample(len(frames)), frames)
            num_samples += 1
            num_frames += len(frames)
            num_bytes += size
        # before the shard gets its name, or a crash in between would lose them
        _write_failures(task.failures_path, failures)
    return ShardReport(num_samples, num_frames, num_bytes)


def _frames(task: ShardTask, annotation: Annotation) -> tuple[list[np.ndarray], int]:
    """The frames of an annotation, and how many bytes its video has."""
    if annotation.video is None:
        return [], 0
    path = task.root / annotation.video
    if not path.is_file():
        # a pipe would never end
        raise FileNotFoundError(f"{path} is no file")
    settings = task.settings
    with path.open("rb") as video:
        frames = extract_frames(
            video, size=settings.size, fps=settings.fps, max_frames=settings.max_frames
        )
        return frames, os.fstat(video.fileno()).st_size


def _failure(line: Line, annotation: Annotation, error: SampleError | OSError) -> Failure:
    return Failure(
        line=line.number + 1,
        id=annotation.id,
        reason="missing video" if isinstance(error, OSError) else "undecodable video",
        error=f"{annotation.video}: {error}",
    )


def _check_settings(output: Path, settings: Settings, annotations_sha256: str) -> None:
    """Shards of two ways to make them do not lie in one folder."""
    path = output / SETTINGS_FILE
    ours = {"version": 1, **asdict(settings), "annotations_sha256": annotations_sha256}
    if not path.exists():
        output.mkdir(parents=True, exist_ok=True)
        _write_text(path, json.dumps(ours, indent=1) + "\n")
        return
    try:
        theirs = json.loads(path.read_text())
    except ValueError:
        raise DataError(f"{path} is not JSON; delete it and the shards beside it") from None
    if theirs != ours:
        names = [k for k in ours if not isinstance(theirs, dict) or theirs.get(k) != ours[k]]
        raise DataError(
            f"{output} holds shards made with other {', '.join(names)} (see {path}); expected the "
            "same, take another --output"
        )


def _chunks(lines: list[Line], size: int) -> list[list[Line]]:
    return [lines[i : i + size] for i in range(0, len(lines), size)]


def _write_failures(path: Path, failures: list[Failure]) -> None:
    if not failures:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(exist_ok=True)
    _write_text(path, "".join(failure.model_dump_json() + "\n" for failure in failures))


def _read_failures(task: ShardTask) -> list[Failure]:
    if not task.failures_path.exists():
        return []
    lines = task.failures_path.read_text().splitlines()
    return [Failure.model_validate_json(line) for line in lines]


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    publish(temporary, path)
