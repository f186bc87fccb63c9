"""From a manifest row to a checked sample and its decoded frames: one ``pread``, no worker hop.

Nothing gets through that is not what the manifest says. Not here: order (``vlm.data.plan``),
tokens (``vlm.data.chat``), threads and batches (``vlm.data.loader``).
"""

import os
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import simplejpeg

from vlm.data import shards
from vlm.data.manifest import Manifest
from vlm.data.schema import Sample
from vlm.errors import SampleError


class LoadedSample(NamedTuple):
    row: int
    sample: Sample
    #: (T, H, W, 3) uint8; T = 0 for text
    frames: np.ndarray


class Reader:
    """Reads samples of a manifest by row; safe to share between threads."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()

    def read(self, row: int) -> LoadedSample:
        """One sample.

        Raises:
            SampleError: it cannot be read or decoded, or is not what the manifest says.
        """
        manifest, where = self._manifest, self._manifest.where(row)
        offset, length = int(manifest.offset[row]), int(manifest.length[row])
        buffer = shards.read_range(self._file(int(manifest.shard[row])), offset, length, where)
        sample, members = shards.parse_members(shards.read_members(buffer, where), where)
        expected = int(manifest.num_frames[row])
        if sample.frame_count != expected:
            raise SampleError(
                f"{where}: {sample.frame_count} frames, but the manifest says {expected}; the "
                "shard has changed, build the manifest again"
            )
        size = int(manifest.height[row]), int(manifest.width[row])
        return LoadedSample(row, sample, decode_frames(members, size, where))

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _file(self, shard: int) -> int:
        with self._lock:
            if shard not in self._files:
                path = self._manifest.shards[shard].path
                self._files[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._files[shard]


def decode_frames(members: Sequence[memoryview], size: tuple[int, int], where: str) -> np.ndarray:
    """Decodes images into one array of (T, *size, 3) uint8.

    Raises:
        SampleError: one is damaged, or has another size.
    """
    frames = np.empty((len(members), *size, 3), np.uint8)
    for index, member in enumerate(members):
        frame = _decode(member, f"{where}, frame {index:03d}")
        if frame.shape[:2] != size:
            raise SampleError(
                f"{where}, frame {index:03d}: found {frame.shape[0]} x {frame.shape[1]} pixels, "
                f"expected {size[0]} x {size[1]} as in the manifest"
            )
        frames[index] = frame
    return frames


def _decode(member: memoryview, where: str) -> np.ndarray:
    shards.frame_shape(member, where)  # from the header alone, before anything is allocated
    try:
        # strict: a damaged file is an error, not a grey area at the bottom of the picture
        return simplejpeg.decode_jpeg(member, colorspace="RGB", strict=True)
    except ValueError as error:
        raise SampleError(f"{where}: a damaged JPEG: {error}") from None
