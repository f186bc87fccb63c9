"""From a row of the catalog to a checked sample and its decoded frames: one read, no worker hop.

Nothing gets through that is not what the manifest says. Not here: order (``vlm.data.plan.plan``),
waiting for shards (``vlm.data.storage.storage``), threads and batches (``vlm.data.load.loader``).
"""

from typing import NamedTuple

import numpy as np

from vlm.data.format import shards
from vlm.data.format.decode import decode_frames
from vlm.data.format.layout import read_content
from vlm.data.format.schema import Sample
from vlm.data.manifest.rows import content_hash
from vlm.data.plan.catalog import Catalog
from vlm.data.storage import remote
from vlm.data.storage.ahead import Range
from vlm.data.storage.storage import Storage
from vlm.errors import SampleError


class LoadedSample(NamedTuple):
    row: int
    sample: Sample
    #: (T, H, W, 3) uint8; T = 0 for text
    frames: np.ndarray


class Reader:
    """Reads samples of a catalog by row; safe to share between threads."""

    def __init__(self, catalog: Catalog, storage: Storage | None = None) -> None:
        self._catalog = catalog
        self.storage = storage or Storage()

    def read(self, row: int) -> LoadedSample:
        """One sample in memory of its own. Raises what ``read_into`` does."""
        manifest, own = self._catalog.locate(row)
        shape = (manifest.num_frames[own], manifest.height[own], manifest.width[own], 3)
        frames = np.empty(shape, np.uint8)
        return LoadedSample(row, self.read_into(row, frames), frames)

    def read_into(self, row: int, out: np.ndarray) -> Sample:
        """One sample, its frames decoded into ``out``.

        Args:
            out: (T, H, W, 3) uint8; where T is k times what is stored, each frame fills k.

        Raises:
            SampleError: it cannot be decoded, or is not what the manifest says.
            TransientError: its shard cannot be reached.
        """
        try:
            return self._read(row, out)
        except SampleError:
            # What was kept of a shard, or arrived of it, may be damaged where the shard is not.
            where = self._range(row)
            self.storage.forget(where.location, where.offset, where.length, where.version)
            return self._read(row, out)

    def read_bytes(self, row: int) -> bytes:
        """The headers and bodies of one sample as they lie in its shard.

        Raises:
            SampleError: the shard is shorter than the manifest says.
            TransientError: it cannot be reached.
        """
        location, version, offset, length = self._range(row)
        found = self.storage.read(location, offset, length, version)
        if len(found) != length:
            raise SampleError(
                f"{self._catalog.where(row)}: found {len(found)} of {length} bytes; the shard has "
                "changed"
            )
        return found

    def remote_range(self, row: int) -> Range | None:
        """Where a row lies if that is not this machine."""
        found = self._range(row)
        return found if remote.is_remote(found.location) else None

    def close(self) -> None:
        self.storage.close()

    def _range(self, row: int) -> Range:
        manifest, own = self._catalog.locate(row)
        shard = self._catalog.shards[self._catalog.shard[row]]
        offset, length = int(manifest.offset[own]), int(manifest.length[own])
        return Range(shard.location, shard.sha256, offset, length)

    def _read(self, row: int, out: np.ndarray) -> Sample:
        manifest, own = self._catalog.locate(row)
        where = manifest.where(own)
        buffer = self.read_bytes(row)
        members = shards.read_members(buffer, where)
        # before decoding, while the bytes are in the processor's cache
        intact = content_hash(members.values()) == manifest.content_hash(own)
        content = read_content(members, where)
        stored = int(manifest.num_frames[own])
        decode_frames(content, out[:stored], manifest.sampling, where)
        if not intact:  # said last, because a fault found above is named more exactly
            raise SampleError(
                f"{where}: its content is not what the manifest was built from; the shard has "
                "changed, build the manifest again"
            )
        if len(out) > stored:
            assert stored and len(out) % stored == 0, (len(out), stored)
            out[...] = out[:stored].repeat(len(out) // stored, axis=0)
        return content.sample
