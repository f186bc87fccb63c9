"""What tells two samples apart when their words and keys may differ: their frames.

Two samples about the same images have one identity, whatever is asked about them; of a text sample
it is what is said. Bytes are compared, so a picture that was encoded or cropped in another way is
another one. Not here: equal rows among many (`vlm.data.format.digests`).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vlm.data.format import layout, shards
from vlm.data.format.digests import as_rows, digest
from vlm.data.format.schema import Sample
from vlm.data.manifest.manifest import Manifest
from vlm.data.manifest.rows import describe
from vlm.data.pool import ordered_map

MEDIA = layout.IMAGE_EXTENSIONS + layout.VIDEO_EXTENSIONS


def said(sample: Sample) -> bytes:
    """The words of a sample, wherever it comes from."""
    return sample.model_dump_json(exclude={"version", "source", "meta"}).encode()


def identity(sample: Sample, bodies: Mapping[str, bytes | memoryview]) -> bytes:
    """16 bytes that samples share whose frames are the same, or whose words are if they have none.

    Args:
        bodies: Its members by name.
    """
    media = [bytes(body) for name, body in bodies.items() if name.endswith(MEDIA)]
    return digest(*media) if media else digest(said(sample))


def identities(
    manifests: Sequence[Manifest],
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[np.ndarray]:
    """For each manifest the identities of its samples: (num_samples, 2) uint64. Reads the shards.

    Args:
        progress: Called with (shards done, shards in all).

    Raises:
        DataError: a shard is not there or has changed.
    """
    tasks = [task for found in manifests for task in _tasks(found)]
    parts: list[bytes] = []
    for part in ordered_map(_read_shard, tasks, workers):
        parts.append(part)
        if progress is not None:
            progress(len(parts), len(tasks))
    rows = as_rows(b"".join(parts))
    ends = np.cumsum([found.num_samples for found in manifests])
    return np.split(rows, ends[:-1])


def contained(rows: np.ndarray, among: np.ndarray) -> np.ndarray:
    """(N,) bool, which rows are equal to one of ``among``; both (_, 2) uint64."""
    # half of each digest finds the few that are worth a look
    found = np.isin(rows[:, 0], among[:, 0])
    near = among[np.isin(among[:, 0], rows[found, 0])]
    known = {row.tobytes() for row in near}
    found[found] = [row.tobytes() in known for row in rows[found]]
    return found


def shard_identities(path: Path) -> tuple[list[str], np.ndarray]:
    """Keys and identities, (N, 2) uint64, of all samples of one shard.

    Raises:
        DataError: it is damaged, or a sample cannot be read.
    """
    ranges = list(shards.scan(path))
    task = _Task(path, [found.offset for found in ranges], [found.length for found in ranges])
    return [found.key for found in ranges], as_rows(_read_shard(task))


class _Task(NamedTuple):
    path: Path
    #: of its samples, in the order of the manifest
    offsets: list[int]
    lengths: list[int]


def _tasks(found: Manifest) -> list[_Task]:
    """One for each shard; the rows of a manifest are in the order of its shards."""
    found.check_shards()
    ends = np.cumsum([shard.num_samples for shard in found.shards])
    offsets = np.split(found.offset, ends[:-1])
    lengths = np.split(found.length, ends[:-1])
    return [
        _Task(shard.path, own.tolist(), sizes.tolist())
        for shard, own, sizes in zip(found.shards, offsets, lengths, strict=True)
    ]


def _read_shard(task: _Task) -> bytes:
    digests = bytearray()
    with shards.open_shard(task.path) as shard:
        for offset, length in zip(task.offsets, task.lengths, strict=True):
            where = describe(task.path, offset, "?")
            buffer = shards.read_range(shard.read, offset, length, where)
            members = shards.read_members(buffer, where)
            digests += identity(layout.read_content(members, where).sample, members)
    return bytes(digests)
