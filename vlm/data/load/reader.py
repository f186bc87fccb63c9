"""From a row of the catalog to a checked sample and its decoded frames: one read, no worker hop.

Nothing gets through that is not what the manifest says. Not here: order (``vlm.data.plan.plan``),
waiting for shards (``vlm.data.storage.storage``), threads and batches (``vlm.data.load.loader``).
"""

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from vlm.data.format import shards
from vlm.data.format.decode import decode_frames
from vlm.data.format.latents import read_latents
from vlm.data.format.layout import Content, read_content
from vlm.data.format.schema import Sample
from vlm.data.manifest.manifest import Manifest
from vlm.data.manifest.rows import content_hash
from vlm.data.plan.catalog import Catalog
from vlm.data.storage import remote
from vlm.data.storage.ahead import Range
from vlm.data.storage.storage import Storage
from vlm.errors import SampleError

#: more bytes than this are not kept for the next read
_MAX_KEPT_BYTES = 64 << 20
_ROUND_BYTES = 4 << 20

Result = TypeVar("Result")


class LoadedSample(NamedTuple):
    row: int
    sample: Sample
    #: (T, H, W, 3) uint8; T = 0 for text
    frames: np.ndarray
    #: (T, C, h, w) float16; None where none were asked for, or there are no frames
    latents: np.ndarray | None = None


class _Place(NamedTuple):
    """Where a row lies."""

    manifest: Manifest
    #: its number in the manifest
    own: int
    range: Range
    #: shard, byte and key, for errors
    where: str


class _Members(NamedTuple):
    """A sample that is read."""

    place: _Place
    #: by name
    members: dict[str, memoryview]
    #: whether its bytes are those that the manifest was built from
    intact: bool


class Opened(NamedTuple):
    """A sample that is read and parsed, until its thread opens others; nothing is decoded yet."""

    place: _Place
    content: Content
    #: whether its bytes are those that the manifest was built from
    intact: bool


class _Memory(threading.local):
    """One thread's memory for the bytes of shards: fresh pages would cost as much as reading."""

    def __init__(self) -> None:
        self.kept = np.empty(0, np.uint8)

    def take(self, size: int) -> memoryview:
        """``size`` bytes with anything in them; what was taken before is gone."""
        if size > _MAX_KEPT_BYTES:
            return memoryview(bytearray(size))
        if size > len(self.kept):
            self.kept = np.empty(-(-size // _ROUND_BYTES) * _ROUND_BYTES, np.uint8)
        return self.kept.data[:size]


class Reader:
    """Reads samples of a catalog by row; safe to share between threads."""

    def __init__(self, catalog: Catalog, storage: Storage | None = None) -> None:
        self._catalog = catalog
        self.storage = storage or Storage()
        self._memory = _Memory()

    def read(self, row: int, latent_shape: tuple[int, ...] | None = None) -> LoadedSample:
        """One sample in memory of its own. Raises what ``read_into`` does.

        Args:
            latent_shape: (C, h, w) of the latents it brings; None: not wanted.
        """
        manifest, own = self._catalog.locate(row)
        shape = (manifest.num_frames[own], manifest.height[own], manifest.width[own], 3)
        frames, latents = np.empty(shape, np.uint8), None
        if latent_shape is not None and len(frames):
            latents = np.empty((len(frames), *latent_shape), np.float16)
        return LoadedSample(row, self.read_into(row, frames, latents), frames, latents)

    def read_into(self, row: int, out: np.ndarray, latents: np.ndarray | None = None) -> Sample:
        """One sample, its frames decoded into ``out``.

        Args:
            out: (T, H, W, 3) uint8; where T is k times what is stored, each frame fills k.
            latents: (T, C, h, w) float16, filled with the frames' latents; None: not wanted.

        Raises:
            SampleError: it cannot be decoded, or is not what the manifest says.
            TransientError: its shard cannot be reached.
        """
        try:
            return self._read(row, out, latents)
        except SampleError:
            # What was kept of a shard, or arrived of it, may be damaged where the shard is not.
            location, version, offset, length = self._range(row)
            self.storage.forget(location, offset, length, version)
            return self._read(row, out, latents)

    def open(self, rows: Sequence[int]) -> list[Opened | None]:
        """Reads samples, then parses them; None for one of which ``read_into`` says what is wrong.

        Several at a time are faster than one by one, because decoding leaves nothing of what
        parsing needs in the processor's caches.

        Raises:
            TransientError: a shard cannot be reached.
        """
        places = [self._place(row) for row in rows]
        memory, at, found = self._memory.take(sum(p.range.length for p in places)), 0, []
        for place in places:
            found.append(_unless_bad(self._members, place, memory[at : at + place.range.length]))
            at += place.range.length
        return [one and _unless_bad(self._parse, *one) for one in found]

    def decode(self, opened: Opened, out: np.ndarray, latents: np.ndarray | None = None) -> None:
        """The frames of a sample, and their latents. Arguments and errors are ``read_into``'s."""
        manifest, own, _, where = opened.place
        stored = int(manifest.num_frames[own])
        decode_frames(opened.content, out[:stored], manifest.sampling, where)
        if not opened.intact:  # said last, because a fault found above is named more exactly
            raise SampleError(
                f"{where}: its content is not what the manifest was built from; the shard has "
                "changed, build the manifest again"
            )
        if latents is not None and stored:
            found = _latents(opened.content, stored, latents.shape[1:], where)
            latents[...] = found.repeat(len(out) // stored, axis=0)
        if len(out) > stored:
            assert stored and len(out) % stored == 0, (len(out), stored)
            out[...] = out[:stored].repeat(len(out) // stored, axis=0)

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

    def _read(self, row: int, out: np.ndarray, latents: np.ndarray | None) -> Sample:
        place = self._place(row)
        opened = self._parse(*self._members(place, self._memory.take(place.range.length)))
        self.decode(opened, out, latents)
        return opened.content.sample

    def _place(self, row: int) -> _Place:
        manifest, own = self._catalog.locate(row)
        return _Place(manifest, own, self._range(row), manifest.where(own))

    def _members(self, place: _Place, memory: memoryview) -> _Members:
        location, version, offset, length = place.range
        found = self.storage.read(location, offset, length, version, memory)
        if len(found) != length:
            raise SampleError(
                f"{place.where}: found {len(found)} of {length} bytes; the shard has changed"
            )
        members = shards.read_members(found, place.where)
        intact = content_hash(members.values()) == place.manifest.content_hash(place.own)
        return _Members(place, members, intact)

    def _parse(self, place: _Place, members: dict[str, memoryview], intact: bool) -> Opened:
        return Opened(place, read_content(members, place.where), intact)


def _unless_bad(action: Callable[..., Result], *args: object) -> Result | None:
    try:
        return action(*args)
    except SampleError:
        return None


def _latents(content: Content, num_frames: int, shape: tuple[int, ...], where: str) -> np.ndarray:
    if content.latents is None:
        raise SampleError(
            f"{where}: no latents beside its frames; precompute them, or name an autoencoder in "
            "model.connector.autoencoder"
        )
    found = read_latents(content.latents, num_frames, where)
    if found.shape[1:] != shape:
        raise SampleError(
            f"{where}: found latents of {found.shape[1:]}, expected {shape} as in model.connector"
        )
    return found
