"""Writes a shard out of byte ranges of others: bodies are copied as they are, never decoded.

A shard appears under its name only when it is whole and on disk. Not here: which samples go where.
"""

import os
import tarfile
from pathlib import Path

from vlm.data.format import shards, tar
from vlm.data.format.layout import split_names
from vlm.errors import DataError

_CHUNK_BYTES = 1 << 20
END_MARKER = bytes(2 * tar.BLOCK)


class ShardCopy:
    """A shard that is being written under a temporary name; an exception drops it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        # the process id keeps two runs into one folder from writing into each other's file
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file = self._temporary.open("wb")

    def copy(self, read: tar.Read, offset: int, length: int, where: str) -> None:
        """Appends bytes of another shard, headers and padding included.

        Raises:
            DataError: the shard is shorter than it was.
        """
        end = offset + length
        while offset < end:
            chunk = read(offset, min(_CHUNK_BYTES, end - offset))
            if not chunk:
                raise DataError(f"{where}: ends at byte {offset}, expected {end}; it has changed")
            self._file.write(chunk)
            offset += len(chunk)

    def copy_renamed(self, read: tar.Read, member: tar.Member, name: str, where: str) -> None:
        """Appends a member under another name, with a header as our writer makes them."""
        info = tarfile.TarInfo(name)
        info.size, info.mode = member.size, 0o444
        self._file.write(info.tobuf(tarfile.USTAR_FORMAT))
        self.copy(read, member.offset, tar.padded(member.size), where)

    def copy_sample(self, read: tar.Read, offset: int, length: int, key: str, where: str) -> None:
        """Appends a sample under another key.

        Raises:
            DataError: the shard has changed.
        """
        members = list(tar.walk(read, offset + length, where, whole=False, begin=offset))
        split = split_names([member.name for member in members])
        for member in members:
            self.copy_renamed(read, member, f"{key}.{split[member.name][1]}", where)

    def __enter__(self) -> "ShardCopy":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with self._file:
            if error is None:
                self._file.write(END_MARKER)
        if error is None:
            shards.publish(self._temporary, self._path)
        else:
            self._temporary.unlink()
