"""From a row of the catalog to a checked sample and its decoded frames: one ``pread``.

Nothing gets through that is not what the manifest says. Not here: order (``vlm.data.plan``),
tokens (``vlm.data.chat``), threads and batches (``vlm.data.loader``).
"""

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vlm.data import shards
from vlm.data.catalog import Catalog
from vlm.data.decode import decode_frames
from vlm.data.layout import read_content
from vlm.data.rows import content_hash
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
    """Reads samples of a catalog by row; safe to share between threads."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, row: int) -> LoadedSample:
        """One sample.

        Raises:
            SampleError: it cannot be read or decoded, or is not what the manifest says.
        """
        where = self._catalog.where(row)
        manifest, own = self._catalog.locate(row)
        offset, length = int(manifest.offset[own]), int(manifest.length[own])
        file = self._file(int(self._catalog.shard[row]), where)
        buffer = shards.read_range(file.read, offset, length, where)
        members = shards.read_members(buffer, where)
        content = read_content(members, where)
        shape = (manifest.num_frames[own], manifest.height[own], manifest.width[own], 3)
        frames = np.empty(shape, np.uint8)
        decode_frames(content, frames, manifest.sampling, where)
        # last, because a fault found above is named more exactly
        if content_hash(members.values()) != manifest.content_hash([own])[0]:
            raise SampleError(
                f"{where}: its content is not what the manifest was built from; the shard has "
                "changed, build the manifest again"
            )
        return LoadedSample(row, content.sample, frames)

    def close(self) -> None:
        with self._lock:
            self._files.clear()

    def _file(self, shard: int, where: str) -> "_OpenFile":
        with self._lock:
            if shard not in self._files:
                self._files[shard] = _open(self._catalog.shards[shard].path, where)
                if len(self._files) > MAX_OPEN_SHARDS:
                    self._files.popitem(last=False)
            self._files.move_to_end(shard)
            return self._files[shard]


class _OpenFile:
    """Closed by whoever lets go of it last: no thread loses the file it reads from."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self.fd, length, offset)

    def __del__(self) -> None:
        os.close(self.fd)


def _open(path: Path, where: str) -> _OpenFile:
    try:
        return _OpenFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise SampleError(f"{where}: the shard cannot be opened: {error.strerror}") from None
