"""Where every sample of a set of shards lies, and by choice its frames and source.

About 60 bytes a sample in memory. Not here: the manifest, which also knows tokens and sizes and
leaves unusable samples out (`vlm.data.manifest.manifest`).
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from vlm.data.format import shards
from vlm.data.format.decode import Sampling, measure
from vlm.data.format.digests import as_rows, digest, equal_rows
from vlm.data.format.layout import Content, read_content
from vlm.data.pool import ordered_map
from vlm.errors import DataError

#: clashes that an error shows
MAX_SHOWN = 3
#: a video file's frames have any size; which one does not change their number
VIDEO_SIZE = 224


@dataclass(frozen=True)
class Index:
    """Entry i of each array is sample i: shards in their order, samples in that of the bytes."""

    paths: list[Path]
    #: (N,) int64 each: row of ``paths``, where the sample starts, its headers, members and padding
    shard: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    keys: pa.ChunkedArray
    #: (N,) int64 each, zeros if the content was not asked for; sources by number
    num_frames: np.ndarray
    source: np.ndarray
    sources: dict[str, int]

    @property
    def num_samples(self) -> int:
        return len(self.shard)

    def check_keys(self, rows: np.ndarray) -> None:
        """Raises DataError if two of the rows have one key."""
        keys = self.keys.take(pa.array(rows))
        digests = b"".join(digest(key.as_py().encode()) for key in keys)
        doubles = list(equal_rows(as_rows(digests)))
        if not doubles:
            return
        shown = "; ".join(
            f"{keys[later].as_py()} in {self.paths[self.shard[rows[first]]]} and "
            f"{self.paths[self.shard[rows[later]]]}"
            for later, first in doubles[:MAX_SHOWN]
        )
        raise DataError(
            f"{len(doubles)} keys are there twice: {shown}; rename them (--rename numbers all "
            "samples anew)"
        )

    def fingerprint(self) -> str:
        """Changes with the keys of the samples and where they lie."""
        found = hashlib.sha256()
        for column in (self.shard, self.offset, self.length):
            found.update(column.tobytes())
        for key in self.keys:
            found.update(key.as_py().encode() + b"\0")
        return found.hexdigest()


@dataclass(frozen=True)
class _Task:
    path: Path
    content: bool


@dataclass(frozen=True)
class _ShardIndex:
    """As `Index`, of one shard; the source by name."""

    ranges: np.ndarray  # (N, 2) int64: offset, length
    keys: pa.Array
    num_frames: list[int]
    sources: list[str]


def build_index(
    paths: Sequence[Path],
    content: bool,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Index:
    """Scans the headers of shards.

    Args:
        content: Read the samples too, for their frames and source.
        progress: Called with (shards done, shards in all).

    Raises:
        DataError: a damaged or foreign shard, a sample that cannot be read, or no sample at all.
    """
    parts: list[_ShardIndex] = []
    sources: dict[str, int] = {}
    numbers: list[np.ndarray] = []
    tasks = [_Task(path, content) for path in paths]
    for part in ordered_map(_index_shard, tasks, workers):
        parts.append(part)
        numbers.append(np.array([sources.setdefault(s, len(sources)) for s in part.sources], int))
        if progress is not None:
            progress(len(parts), len(tasks))
    counts = [len(part.ranges) for part in parts]
    if not sum(counts):
        raise DataError(f"{len(paths)} shards without a sample; expected at least one")
    ranges = np.concatenate([part.ranges for part in parts])
    zeros = np.zeros(len(ranges), int)
    return Index(
        paths=list(paths),
        shard=np.repeat(np.arange(len(paths)), counts),
        offset=ranges[:, 0],
        length=ranges[:, 1],
        keys=pa.chunked_array([part.keys for part in parts]),
        num_frames=np.concatenate([part.num_frames for part in parts]) if content else zeros,
        source=np.concatenate(numbers) if content else zeros,
        sources=sources,
    )


def _index_shard(task: _Task) -> _ShardIndex:
    ranges, keys, num_frames, sources = [], [], [], []
    with shards.open_shard(task.path) as shard:
        for found in shards.scan_file(shard, task.path):
            ranges.append((found.offset, found.length))
            keys.append(found.key)
            if task.content:
                where = f"{task.path} at byte {found.offset}, key {found.key}"
                buffer = bytes(shard.read(found.offset, found.length))
                content = read_content(shards.read_members(buffer, where), where)
                num_frames.append(count_frames(content, where))
                sources.append(content.sample.source)
    return _ShardIndex(
        np.array(ranges, np.int64).reshape(-1, 2), pa.array(keys, pa.string()), num_frames, sources
    )


def count_frames(content: Content, where: str) -> int:
    """Frames of a sample; those of a video file as they are taken at 1 fps, from its headers.

    Raises:
        SampleError: the video cannot be read.
    """
    if content.sample.frame_count is not None:
        return content.sample.frame_count
    return measure(content, VIDEO_SIZE, Sampling(), where).num_frames
