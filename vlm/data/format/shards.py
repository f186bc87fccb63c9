"""Shards: plain WebDataset tars, written whole or not at all, read one sample at a time.

A sample is a run of adjacent members that share a key: ``KEY.json``, then ``KEY.000.jpg`` and so
on. Whatever reads a shard trusts nothing in it: only regular files with known extensions pass, and
nothing is ever unpickled. Not here: what the members of a key mean (`vlm.data.format.layout`), and
which samples are read when.
"""

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
from webdataset import TarWriter

from vlm.data.format import tar
from vlm.data.format.layout import EXTENSIONS, IMAGE_EXTENSIONS, LATENTS, split_names
from vlm.data.format.schema import Sample
from vlm.errors import DataError, SampleError

#: a sample is read in one piece
MAX_SAMPLE_BYTES = 256 << 20
_CHUNK_BYTES = 1 << 20
JPEG_QUALITY = 95

_FRAME = rf"\d+\.(?:{'|'.join(IMAGE_EXTENSIONS)})"
# frames first: there are more of them than of all others
_NAME = re.compile(rf"[^./\\]+\.(?:{_FRAME}|{'|'.join(map(re.escape, EXTENSIONS))})")


class SampleRange(NamedTuple):
    """Where a sample lies in its shard: headers, bodies and padding."""

    key: str
    offset: int
    length: int
    members: tuple[tar.Member, ...]


class ShardFile(NamedTuple):
    """An open shard."""

    #: bytes of the shard from an offset, fewer at its end
    read: tar.Read
    num_bytes: int
    #: another one whenever the shard has been written to
    version: str


@contextmanager
def open_shard(path: Path) -> Iterator[ShardFile]:
    """Opens a shard for reading; whatever reads whole shards comes through here.

    Raises:
        DataError: it cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"shard {path}: {error.strerror}") from None
    try:
        state = os.fstat(fd)
        yield ShardFile(
            lambda offset, length: os.pread(fd, length, offset),
            state.st_size,
            str(state.st_mtime_ns),
        )
    finally:
        os.close(fd)


def scan(path: Path) -> Iterator[SampleRange]:
    """The samples of a shard in file order, found by reading its headers only.

    Raises:
        DataError: not a whole tar, a member that is no regular file with a known extension, or a
            key whose members are not adjacent; the message holds shard, byte and member.
    """
    with open_shard(path) as shard:
        yield from scan_file(shard, path)


def scan_file(shard: ShardFile, path: Path | str) -> Iterator[SampleRange]:
    """``scan`` of a shard that is open."""
    found: list[tar.Member] = []
    for member in tar.walk(shard.read, shard.num_bytes, str(path)):
        if fault := member_fault(member):
            raise DataError(f"{path} at byte {member.start}: {fault}")
        found.append(member)
    split = split_names([member.name for member in found])
    seen: set[str] = set()
    for key, group in itertools.groupby(found, lambda member: split[member.name][0]):
        members = tuple(group)
        if key in seen:
            raise DataError(
                f"{path} at byte {members[0].start}: key {key!r} appears again; its members must "
                "be adjacent"
            )
        seen.add(key)
        if len({member.name for member in members}) < len(members):
            raise DataError(
                f"{path} at byte {members[0].start}: a second member {_repeated(members)!r}"
            )
        offset = members[0].start
        yield SampleRange(key, offset, members[-1].end - offset, members)


def _repeated(members: Sequence[tar.Member]) -> str:
    names = [member.name for member in members]
    return next(name for name in names if names.count(name) > 1)


def member_fault(member: tar.Member) -> str:
    """Why a member may not be in a shard; empty if it may."""
    name = member.name
    if not member.odd_type and _NAME.fullmatch(name) and name.isprintable():
        return ""
    if member.odd_type:
        return f"member {name!r} is {member.odd_type}; expected regular files"
    if "/" in name or "\\" in name or name.startswith("."):
        return f"member {name!r} is in a folder or hidden; expected KEY.EXTENSION"
    return (
        f"member {name!r} is not KEY.EXTENSION with one of {', '.join(EXTENSIONS)}, nor a frame "
        "KEY.000.jpg"
    )


def read_range(read: tar.Read, offset: int, length: int, where: str) -> bytes | memoryview:
    """A sample's bytes, all of them.

    Raises:
        SampleError: the shard has fewer, or they are more than one sample may have.
    """
    if length > MAX_SAMPLE_BYTES:
        raise SampleError(f"{where}: {length} bytes, at most {MAX_SAMPLE_BYTES} are read")
    buffer = read(offset, length)
    if len(buffer) != length:
        raise SampleError(f"{where}: found {len(buffer)} of {length} bytes; the shard has changed")
    return buffer


def chunks(shard: ShardFile, begin: int, end: int) -> Iterator[bytes | memoryview]:
    """Bytes [begin, end) of a shard, a piece at a time."""
    for offset in range(begin, end, _CHUNK_BYTES):
        yield shard.read(offset, min(_CHUNK_BYTES, end - offset))


def read_members(buffer: bytes | memoryview, where: str) -> dict[str, memoryview]:
    """The members of one sample's byte range, by full name, in file order.

    Raises:
        SampleError: a damaged header, a name or type that is not allowed, more than one key.
    """
    view = memoryview(buffer)
    found: dict[str, memoryview] = {}
    try:
        for member in tar.walk(lambda at, size: view[at : at + size], len(view), where, False):
            if fault := member_fault(member):
                raise SampleError(f"{where}: {fault}")
            name, _, start, size, _ = member
            if name in found:
                raise SampleError(f"{where}: a second member {name!r}")
            found[name] = view[start : start + size]
    except SampleError:
        raise
    except DataError as error:
        raise SampleError(str(error)) from None
    if len({name.partition(".")[0] for name in found}) != 1:
        # ``KEY_000.jpg`` looks like a key of its own
        if len({key for key, _ in split_names(found).values()}) != 1:
            raise SampleError(f"{where}: members {list(found)[:4]} are not of one key")
    return found


def find_shards(paths: Sequence[Path]) -> list[Path]:
    """The tars among ``paths`` and in the folders among them, absolute, each once, sorted.

    Raises:
        DataError: a path that does not exist, or a folder without tars.
    """
    found: set[Path] = set()
    for path in paths:
        tars = list(path.glob("*.tar")) if path.is_dir() else [path]
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; expected a .tar or a folder of them")
        if not tars:
            raise DataError(f"{path}: holds no *.tar")
        found.update(Path(os.path.abspath(shard)) for shard in tars)
    return sorted(found)


class ShardWriter:
    """Writes samples into ``FOLDER/PREFIX-00000.tar`` and so on, the same bytes every time.

    A shard appears under its name only when it is complete and on disk; leaving the ``with`` block
    by an exception drops the open one.
    """

    def __init__(
        self, folder: Path, prefix: str, samples_per_shard: int, first_shard: int = 0
    ) -> None:
        self.folder = folder
        self.prefix = prefix
        self.samples_per_shard = samples_per_shard
        self.next_shard = first_shard
        self._shard: _OpenShard | None = None

    def write(
        self,
        index: int,
        sample: Sample,
        frames: Sequence[np.ndarray],
        latents: bytes | None = None,
    ) -> None:
        """Adds a sample under the key ``index``, which is unique over all shards of a data set.

        Args:
            index: 0 to 99999999.
            sample: Its ``frame_count`` is the number of ``frames``.
            frames: Each (H, W, 3) uint8, RGB.
            latents: Of the frames, as ``vlm.data.format.latents`` makes them.
        """
        assert sample.frame_count == len(frames), "the sample does not describe these frames"
        if self._shard is None:
            self._shard = _OpenShard(self.folder / f"{self.prefix}-{self.next_shard:05d}.tar")
            self.next_shard += 1
        self._shard.add(f"{index:08d}", sample, frames, latents)
        if self._shard.num_samples == self.samples_per_shard:
            self.close()

    def close(self) -> None:
        """Publishes the open shard, if there is one."""
        if self._shard is not None:
            self._shard.publish()
            self._shard = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
        elif self._shard is not None:
            self._shard.drop()
            self._shard = None


class _OpenShard:
    """One shard under a temporary name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_samples = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        # the process id keeps two runs into one folder from writing into each other's file
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self.file = self.temporary.open("wb")
        self.tar = TarWriter(self.file, user="", group="", mtime=0, encoder=False)

    def add(
        self, key: str, sample: Sample, frames: Sequence[np.ndarray], latents: bytes | None
    ) -> None:
        # TarWriter sorts the members of one call; the JSON member comes first
        self.tar.write({"__key__": key, "json": sample.to_json()})
        if len(frames):
            jpegs = {f"{i:03d}.jpg": encode_jpeg(frame) for i, frame in enumerate(frames)}
            self.tar.write({"__key__": key, **jpegs})
        if latents is not None:
            self.tar.write({"__key__": key, LATENTS: latents})
        self.num_samples += 1

    def publish(self) -> None:
        self.tar.close()
        self.file.close()
        publish(self.temporary, self.path)

    def drop(self) -> None:
        try:
            self.tar.close()
        finally:
            self.file.close()
            self.temporary.unlink()


def publish(temporary: Path, path: Path) -> None:
    """Gives a finished file its name; after a crash it is there whole, or not at all."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def encode_jpeg(frame: np.ndarray) -> bytes:
    """(H, W, 3) uint8 RGB to a JPEG without chroma subsampling: small frames have no pixels to
    spare."""
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(frame),
        quality=JPEG_QUALITY,
        colorspace="RGB",
        colorsubsampling="444",
        fastdct=False,
    )
