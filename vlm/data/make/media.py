"""Opens the images and videos that annotations name: files, archive members, parquet cells.

A ref is a string, relative to a root folder:

    clips/a.mp4                     a file
    train.zip!a/b.mp4               a member of a zip or of an uncompressed tar
    part-0.parquet!17/image         row 17 of a column; a struct {bytes, path} gives its bytes
    part-0.parquet!17/images/0      a list's items by position, a struct's fields by name

Refs come from data sets of anybody: no ref leads out of the root, and sizes are bounded before
anything is read. Not here: decoding (`vlm.data.format.frames`), fetching from a network
(`vlm.data.make.download`).
"""

import errno
import io
import re
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from vlm.data.make.archives import Archive, MissingMediaError, open_archive
from vlm.errors import SampleError, TransientError

#: of a file, which is read piece by piece; members of archives are held in memory
MAX_FILE_BYTES = 16 << 30
#: archives that one reader keeps open
MAX_OPEN_ARCHIVES = 8

_REF = re.compile(r"(.*?\.(?:zip|tar|parquet))!(.+)", re.IGNORECASE | re.DOTALL)
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


class Ref(NamedTuple):
    """A ref, taken apart."""

    path: str
    #: empty for a plain file
    member: str


def parse_ref(ref: str) -> Ref:
    """Takes a ref apart.

    Raises:
        ValueError: it is empty or leads out of the root.
    """
    match = _REF.fullmatch(ref)
    path, member = match.groups() if match else (ref, "")
    parts = PurePosixPath(path).parts
    if not parts or "\0" in ref or path.startswith("/") or ".." in parts:
        raise ValueError(f"{ref[:200]!r} leads out of the root folder; expected a path inside")
    return Ref(path, member)


class MediaReader:
    """Opens refs below one root, in one process; archives stay open until it is closed."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._archives: OrderedDict[str, Archive] = OrderedDict()

    def open(self, ref: str) -> BinaryIO:
        """A seekable file of what a ref names; the caller closes it.

        Raises:
            MissingMediaError: there is no such file, member or cell.
            SampleError: it is too large, no regular file, outside the root or in a damaged archive.
            TransientError: the file system failed, or the root is gone.
        """
        try:
            path, member = parse_ref(ref)
        except ValueError as error:
            raise SampleError(str(error)) from None
        try:
            if member:
                return io.BytesIO(self._archive(path).read(member))
            return self._file(path)
        except OSError as error:
            raise self._explained(path, error) from None

    def _file(self, path: str) -> BinaryIO:
        file = self._inside(path).open("rb")
        if (size := file.seek(0, io.SEEK_END)) > MAX_FILE_BYTES:
            file.close()
            raise SampleError(f"{path} has {size} bytes, at most {MAX_FILE_BYTES} are read")
        file.seek(0)
        return file

    def _archive(self, path: str) -> Archive:
        if path not in self._archives:
            self._archives[path] = open_archive(self._inside(path))
            if len(self._archives) > MAX_OPEN_ARCHIVES:
                self._archives.popitem(last=False)[1].close()
        self._archives.move_to_end(path)
        return self._archives[path]

    def _inside(self, path: str) -> Path:
        """The real path of a regular file; links may not lead out of the root either."""
        real = (self.root / path).resolve(strict=True)
        # the cache of huggingface_hub links SNAPSHOT/file to ../../blobs/HASH
        blobs = self.root.parent.parent / "blobs"
        if not real.is_relative_to(self.root) and not real.is_relative_to(blobs):
            raise SampleError(f"{path} is a link out of the root folder; take the real folder")
        if not real.is_file():
            # a pipe would never end
            raise MissingMediaError(f"{path} is no file")
        return real

    def _explained(self, path: str, error: OSError) -> Exception:
        if error.errno in _NOT_THERE and self.root.is_dir():
            return MissingMediaError(f"no file {path}")
        if isinstance(error, PermissionError):
            return SampleError(f"{path}: {error.strerror}")
        return TransientError(f"{self.root / path}: {error}; try again when it is back")

    def close(self) -> None:
        while self._archives:
            self._archives.popitem()[1].close()

    def __enter__(self) -> "MediaReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
