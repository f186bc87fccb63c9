"""Damage to shards after their manifest was built: what disks, networks and attackers do."""

import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from vlm.data.plan.catalog import Catalog

Members = list[tuple[str, bytes]]


class Place(NamedTuple):
    """Where a sample lies."""

    path: Path
    offset: int
    length: int
    key: str

    def members(self) -> Members:
        raw = self.path.read_bytes()[self.offset : self.offset + self.length]
        with tarfile.open(fileobj=io.BytesIO(raw + bytes(1024))) as archive:
            return [(info.name, archive.extractfile(info).read()) for info in archive]  # type: ignore[union-attr]

    def write(self, raw: bytes, at: int = 0) -> None:
        with self.path.open("r+b") as file:
            file.seek(self.offset + at)
            file.write(raw)

    def replace(self, members: Members) -> None:
        """Other members in the same room; a text that nobody reads fills it."""
        raw = _pack(members)
        left = self.length - len(raw)
        assert left == 0 or left >= 512, "no room"
        if left:
            raw += _pack([(f"{self.key}.txt", b"x" * (left - 512))])
        self.write(raw[: self.length])


def _pack(members: Members) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    end = sum(512 + -(-len(body) // 512) * 512 for _, body in members)
    return file.getvalue()[:end]


def place(data: Catalog, row: int) -> Place:
    manifest, own = data.locate(row)
    shard = data.shards[data.shard[row]]
    return Place(shard.path, int(manifest.offset[own]), int(manifest.length[own]), data.key(row))


class _Bomb:
    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, (str(MARK),)


#: exists once anything of a shard was executed
MARK = Path("unpickled")


def flipped(at: Place) -> None:
    raw = at.path.read_bytes()
    middle = at.offset + at.length // 2
    at.write(bytes([raw[middle] ^ 0x10]), at.length // 2)


def missing_member(at: Place) -> None:
    at.replace(at.members()[:-1])


def no_image(at: Place) -> None:
    (words, (name, image), *rest) = at.members()
    at.replace([words, (name, b"<html>".ljust(len(image))), *rest])


def pixel_bomb(at: Place) -> None:
    (words, (name, image), *rest) = at.members()
    frame = image.index(b"\xff\xc0")  # of the baseline header: length, precision, height, width
    size = (10_000).to_bytes(2, "big")
    at.replace([words, (name, image[: frame + 5] + size + size + image[frame + 9 :]), *rest])


def renamed(name: bytes) -> Callable[[Place], None]:
    """The first member's header says ``name``, and its checksum fits."""

    def change(at: Place) -> None:
        header = bytearray(at.path.read_bytes()[at.offset : at.offset + 512])
        header[:100] = name.ljust(100, b"\0")
        _sign(header)
        at.write(bytes(header))

    return change


def huge_json(at: Place) -> None:
    header = bytearray(at.path.read_bytes()[at.offset : at.offset + 512])
    header[124:136] = b"%011o\0" % (1 << 30)
    _sign(header)
    at.write(bytes(header))


def _sign(header: bytearray) -> None:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)


def words(**changes: object) -> Callable[[Place], None]:
    """The sample's JSON with other values; NaN is written as Python writes it."""

    def change(at: Place) -> None:
        ((name, raw), *frames) = at.members()
        at.replace([(name, json.dumps(json.loads(raw) | changes).encode()), *frames])

    return change


def pickled(extension: str) -> Callable[[Place], None]:
    """A member that runs code in readers which decode by extension."""

    def change(at: Place) -> None:
        (words, *frames) = at.members()
        at.replace([words, (f"{at.key}.{extension}", pickle.dumps(_Bomb())), *frames[:-2]])

    return change


def truncated(at: Place) -> None:
    """Nothing is left of the shard from the middle of the sample on."""
    os.truncate(at.path, at.offset + at.length // 2)


#: name -> the damage, and words of the message that names it
DAMAGE: dict[str, tuple[Callable[[Place], None], str]] = {
    "truncated": (truncated, "bytes; the shard has changed"),
    "flipped": (flipped, ""),
    "missing member": (missing_member, "frame_count"),
    "no image": (no_image, "not a JPEG"),
    "pixel bomb": (pixel_bomb, "10000x10000 pixels"),
    "NUL key": (renamed(b"0000\0.json"), "is not KEY.EXTENSION"),
    "path": (renamed(b"../../etc/passwd.json"), "in a folder"),
    "JSON of 1 GB": (huge_json, "needs 1073741824 bytes"),
    "NaN": (words(frame_count=float("nan")), "frame_count"),
    "no frames": (words(frame_count=0), "frame"),
    "10,000 frames": (words(frame_count=10_000), "frame_count"),
    "pickle": (pickled("pyd"), "is not KEY.EXTENSION"),
    "torch": (pickled("pth"), "is not KEY.EXTENSION"),
}


def spoil(data: Catalog, rows: dict[str, int]) -> None:
    for name, row in rows.items():
        DAMAGE[name][0](place(data, row))
