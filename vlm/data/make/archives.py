"""Members of zips, uncompressed tars and parquet files, each by its name, bounded and in memory.

For archives that data sets are published in. Not here: our own shards, which are stricter
(`vlm.data.format.shards`), and which member is wanted (`vlm.data.make.media`).
"""

import tarfile
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from vlm.errors import SampleError

MAX_MEMBER_BYTES = 1 << 30
_CELL_BATCH = 32


class MissingMediaError(SampleError):
    """What was named is not there; the message does not name the sample."""


class Archive(Protocol):
    """What zips, tars and parquet files have in common."""

    def names(self) -> Iterator[str]: ...

    def read(self, member: str) -> bytes:
        """MissingMediaError without such a member, SampleError if it is too large or damaged."""

    def close(self) -> None: ...


def open_archive(path: Path) -> Archive:
    """Opens an archive by its suffix.

    Raises:
        OSError: it is not there, or cannot be read.
        SampleError: it is damaged, or of another kind.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise SampleError(f"{path.name}: expected one of {', '.join(SUFFIXES)}; unpack it first")
    with _faults_of(path.name):
        return SUFFIXES[suffix](path)


@contextmanager
def _faults_of(where: str) -> Iterator[None]:
    """Damage, as each library words it, becomes one kind of error."""
    try:
        yield
    except KeyError:
        raise MissingMediaError(f"{where} is not there") from None
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        pa.ArrowException,
        zlib.error,
        EOFError,
        # of zipfile: encrypted, or compressed in an unknown way
        RuntimeError,
        # of tarfile: an offset past the end
        ValueError,
    ) as error:
        raise SampleError(f"{where} cannot be read: {error}") from None


def _check_size(where: str, size: int) -> None:
    if size > MAX_MEMBER_BYTES:
        raise SampleError(f"{where} has {size} bytes, at most {MAX_MEMBER_BYTES} are read")


class ZipArchive:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.zip = zipfile.ZipFile(path)

    def names(self) -> Iterator[str]:
        return (info.filename for info in self.zip.infolist() if not info.is_dir())

    def read(self, member: str) -> bytes:
        where = f"{self.path.name}, member {member[:200]!r}"
        with _faults_of(where):
            _check_size(where, self.zip.getinfo(member).file_size)
            # zipfile stops at the size that was checked, whatever the data inflate to
            return self.zip.read(member)

    def close(self) -> None:
        self.zip.close()


class TarArchive:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("rb")
        try:
            with tarfile.open(fileobj=self.file, mode="r:") as archive:
                self.members = {
                    info.name.removeprefix("./"): (info.offset_data, info.size)
                    for info in archive
                    if info.isreg() and not info.issparse()
                }
        except BaseException:
            self.file.close()
            raise

    def names(self) -> Iterator[str]:
        return iter(self.members)

    def read(self, member: str) -> bytes:
        where = f"{self.path.name}, member {member[:200]!r}"
        with _faults_of(where):
            offset, size = self.members[member]
            _check_size(where, size)
            self.file.seek(offset)
            body = self.file.read(size)
            if len(body) < size:
                raise EOFError(f"found {len(body)} of {size} bytes")
            return body

    def close(self) -> None:
        self.file.close()


class ParquetArchive:
    """Cells named ``ROW/COLUMN``, then list positions or struct fields.

    Rows are decoded a few at a time and forward, because one row group of images may be larger
    than memory; going back starts at the row's group again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = pq.ParquetFile(path)
        meta = self.file.metadata
        sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        self.starts = [0, *accumulate(sizes)]
        self.column = ""
        self.first = 0
        self.values: list[Any] = []
        self.batches: Iterator[pa.RecordBatch] = iter(())

    def names(self) -> Iterator[str]:
        columns = self.file.schema_arrow.names
        return (f"{row}/{name}" for row in range(self.starts[-1]) for name in columns)

    def read(self, member: str) -> bytes:
        where = f"{self.path.name}, cell {member[:200]!r}"
        row, _, path = member.partition("/")
        column, *inner = path.split("/")
        with _faults_of(where):
            if not row.isdecimal() or int(row) >= self.starts[-1]:
                raise KeyError(row)
            if column not in self.file.schema_arrow.names:
                raise KeyError(column)
            value = self._cell(int(row), column)
            for step in inner:
                value = _step(value, step)
            if isinstance(value, dict):
                value = value["bytes"]
        if value is None:
            raise MissingMediaError(f"{where} is empty")
        if not isinstance(value, bytes):
            raise SampleError(f"{where} holds {type(value).__name__}; expected bytes")
        _check_size(where, len(value))
        return value

    def _cell(self, row: int, column: str) -> Any:
        group = bisect_right(self.starts, row) - 1
        start, end = self.starts[group], self.first + len(self.values)
        if column != self.column or row < self.first or start > end:
            self.column, self.first, self.values = column, start, []
            groups = range(group, len(self.starts) - 1)
            self.batches = self.file.iter_batches(_CELL_BATCH, groups, [column])
        while row >= self.first + len(self.values):
            self.first += len(self.values)
            self.values = next(self.batches).column(0).to_pylist()
        return self.values[row - self.first]

    def close(self) -> None:
        self.file.close()


def _step(value: Any, step: str) -> Any:
    if isinstance(value, dict):
        return value[step]
    if isinstance(value, list) and step.isdecimal() and int(step) < len(value):
        return value[int(step)]
    raise KeyError(step)


SUFFIXES: dict[str, Callable[[Path], Archive]] = {
    ".zip": ZipArchive,
    ".tar": TarArchive,
    ".parquet": ParquetArchive,
}
