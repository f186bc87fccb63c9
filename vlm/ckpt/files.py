"""Files that must not be lost: written through to the disk, described by size and hash.

Not here: what stands in them (``vlm.ckpt.save``), tensors (``vlm.ckpt.tensors``).
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

#: bytes and sha256 of a file
FileInfo = dict[str, int | str]

#: suffix of what is still being written
TEMPORARY = ".tmp"
CHUNK = 16 * 2**20


class DurableFile:
    """A new file that is hashed while it is written and lies on the disk when it is closed.

    Raises:
        OSError: the disk is full, the folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)

    @property
    def info(self) -> FileInfo:
        """Of what was written, not of what a reader would find."""
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}

    def __enter__(self) -> "DurableFile":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with self._file:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())


def write_json(path: Path, value: Any) -> FileInfo:
    with DurableFile(path) as file:
        file.write(json.dumps(value, indent=1).encode())
    return file.info


def copy(source: Path, target: Path) -> FileInfo:
    """Copies a file; what it describes is what was read."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as original, DurableFile(target) as file:
        while chunk := original.read(CHUNK):
            file.write(chunk)
    return file.info


def describe(path: Path) -> FileInfo:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_text(path: Path, text: str) -> None:
    """A reader sees the old text or the new one, whatever happens meanwhile."""
    temporary = path.with_name(path.name + TEMPORARY)
    with DurableFile(temporary) as file:
        file.write(text.encode())
    os.replace(temporary, path)
    sync(path.parent)


def sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Returns when the disk holds the file, or the names in the folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(checkpoint: Path, marker: str) -> None:
    """Removes a folder; its marker goes first: half a checkpoint must not look like a whole one."""
    (checkpoint / marker).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)
