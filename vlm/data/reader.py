"""From a manifest row to a checked sample and its decoded frames: one ``pread``, no worker hop.

Nothing gets through that is not what the manifest says. Not here: order (``vlm.data.plan``),
tokens (``vlm.data.chat``), threads and batches (``vlm.data.loader``).
"""

import functools
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg

from vlm.data import shards
from vlm.data.manifest import Manifest
from vlm.data.schema import Sample
from vlm.errors import SampleError

#: shards that stay open: about those of one window of a plan, and far from the usual 1024 files
MAX_OPEN_SHARDS = 256


class LoadedSample(NamedTuple):
    row: int
    sample: Sample
    #: (T, H, W, 3) uint8; T = 0 for text
    frames: np.ndarray


class Reader:
    """Reads samples of a manifest by row; safe to share between threads."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, row: int) -> LoadedSample:
        """One sample.

        Raises:
            SampleError: it cannot be read or decoded, or is not what the manifest says.
        """
        manifest, where = self._manifest, self._manifest.where(row)
        offset, length = int(manifest.offset[row]), int(manifest.length[row])
        file = self._file(int(manifest.shard[row]), where)
        members = shards.read_members(shards.read_range(file.fd, offset, length, where), where)
        sample, jpegs = shards.parse_members(members, where)
        expected = int(manifest.num_frames[row])
        if sample.frame_count != expected:
            raise SampleError(
                f"{where}: {sample.frame_count} frames, but the manifest says {expected}; the "
                "shard has changed, build the manifest again"
            )
        size = int(manifest.height[row]), int(manifest.width[row])
        names = shards.frame_names(manifest.key(row), expected)
        frames = decode_frames(dict(zip(names, jpegs, strict=True)), size, where)
        # last, because a fault found above is named more exactly
        if content_hash(members.values()) != self._content_hashes[row].as_py():
            raise SampleError(
                f"{where}: its content is not what the manifest was built from; the shard has "
                "changed, build the manifest again"
            )
        return LoadedSample(row, sample, frames)

    def close(self) -> None:
        with self._lock:
            self._files.clear()

    def _file(self, shard: int, where: str) -> "_OpenFile":
        with self._lock:
            if shard not in self._files:
                self._files[shard] = _open(self._manifest.shards[shard].path, where)
                if len(self._files) > MAX_OPEN_SHARDS:
                    self._files.popitem(last=False)
            self._files.move_to_end(shard)
            return self._files[shard]

    @functools.cached_property
    def _content_hashes(self) -> pa.Array:
        table = pq.read_table(self._manifest.path, columns=["content_hash"])
        return table["content_hash"].combine_chunks()


class _OpenFile:
    """Closed by whoever lets go of it last: no thread loses the file it reads from."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


def _open(path: Path, where: str) -> _OpenFile:
    try:
        return _OpenFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise SampleError(f"{where}: the shard cannot be opened: {error.strerror}") from None


def content_hash(bodies: Iterable[memoryview]) -> bytes:
    """What the manifest holds of a sample's members, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for body in bodies:
        digest.update(body)
    return digest.digest()


def decode_frames(jpegs: Mapping[str, memoryview], size: tuple[int, int], where: str) -> np.ndarray:
    """Decodes images, by their member's name, into one array of (T, *size, 3) uint8.

    Raises:
        SampleError: one is damaged, or has another size.
    """
    frames = np.empty((len(jpegs), *size, 3), np.uint8)
    for index, (name, jpeg) in enumerate(jpegs.items()):
        member = f"{where}, member {name}"
        # from the header alone, before anything is allocated
        found = shards.frame_shape(jpeg, member)
        if found != size:
            raise SampleError(
                f"{member}: found {found[0]} x {found[1]} pixels, expected {size[0]} x {size[1]} "
                "as in the manifest; the shard has changed, build the manifest again"
            )
        try:
            # strict: a damaged file is an error, not a grey area at the bottom of the picture
            simplejpeg.decode_jpeg(jpeg, colorspace="RGB", strict=True, buffer=frames[index])
        except ValueError as error:
            raise SampleError(f"{member}: a damaged JPEG: {error}") from None
    return frames
