"""Records of the files that data sets publish their metadata in: JSON, JSON lines, CSV, Parquet.

One record at a time, whatever the size of the file. A record that cannot be parsed becomes a
failure and the next one follows. Not here: what the fields mean (the adapters).
"""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from vlm.data.make.adapters.json_items import json_items
from vlm.data.make.annotations import Failure
from vlm.errors import DataError

#: a record is a conversation and its metadata; 16 times the JSON that a sample may have
MAX_LINE_BYTES = 64 << 20
BAD_ROW = "unreadable record"
_ROWS = 1024
#: of tables that hold images
_IMAGE_ROWS = 16


class Record(NamedTuple):
    #: file and row, for messages
    where: str
    #: row of the file, from 0
    row: int
    fields: dict[str, Any]


def find(root: Path, *patterns: str) -> list[Path]:
    """Files below ``root`` that match any of the globs, sorted.

    Raises:
        DataError: there are none.
    """
    found = {path for pattern in patterns for path in root.glob(pattern) if path.is_file()}
    if not found:
        expected = ", ".join(patterns)
        raise DataError(f"{root}: holds no {expected}; expected the data set as it is published")
    return sorted(found)


def read(
    path: Path, columns: Sequence[str] | None = None, key: str | None = None
) -> Iterator[Record | Failure]:
    """The records of a .jsonl, .json, .csv, .tsv or .parquet file.

    Args:
        columns: The only ones wanted of a Parquet file; those that are not there are left out.
        key: Of the array, where a .json file holds an object.

    Raises:
        DataError: the file cannot be read, or is of another kind.
    """
    try:
        match path.suffix.lower():
            case ".jsonl" | ".ndjson":
                yield from _json_lines(path)
            case ".json":
                for row, item in enumerate(json_items(path, key)):
                    yield checked(f"{path.name}, item {row + 1}", row, item)
            case ".csv":
                yield from _csv_rows(path, ",")
            case ".tsv":
                yield from _csv_rows(path, "\t")
            case ".parquet":
                yield from _parquet_rows(path, columns)
            case _:
                raise DataError(f"{path}: expected .jsonl, .json, .csv, .tsv or .parquet")
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _json_lines(path: Path) -> Iterator[Record | Failure]:
    with path.open("rb") as file:
        row = 0
        while line := file.readline(MAX_LINE_BYTES):
            where = f"{path.name}, line {row + 1}"
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                    # drops what is left of the line
                    continue
                yield Failure(reason=BAD_ROW, error=f"{where}: over {MAX_LINE_BYTES} bytes")
            elif line.strip():
                yield _parsed(where, row, line)
            row += 1


def _parsed(where: str, row: int, raw: bytes) -> Record | Failure:
    try:
        return checked(where, row, json.loads(raw, parse_constant=_refuse))
    except (ValueError, RecursionError) as error:
        return Failure(reason=BAD_ROW, error=f"{where}: {error}")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def checked(where: str, row: int, fields: Any) -> Record | Failure:
    """A record of parsed JSON, if it is an object whose text can be written again."""
    if not isinstance(fields, dict):
        found = type(fields).__name__
        return Failure(reason=BAD_ROW, error=f"{where}: found {found}; expected an object")
    try:
        # lone surrogates: escaped in JSON, or what stands for bytes that are no UTF-8
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return Failure(reason=BAD_ROW, error=f"{where}: not UTF-8")
    return Record(where, row, fields)


def _csv_rows(path: Path, delimiter: str) -> Iterator[Record | Failure]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.DictReader(file, delimiter=delimiter, strict=True)
        row = 0
        while True:
            where = f"{path.name}, row {row + 1}"
            try:
                fields = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield Failure(reason=BAD_ROW, error=f"{where}: {error}")
            else:
                if None in fields or None in fields.values():
                    yield Failure(reason=BAD_ROW, error=f"{where}: another number of columns")
                else:
                    yield checked(where, row, dict(fields))
            row += 1


def _parquet_rows(path: Path, columns: Sequence[str] | None) -> Iterator[Record | Failure]:
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        wanted = names if columns is None else [name for name in columns if name in names]
        binary = any("binary" in str(file.schema_arrow.field(name).type) for name in wanted)
        row = 0
        for batch in file.iter_batches(_IMAGE_ROWS if binary else _ROWS, columns=wanted):
            for fields in _rows(batch):
                where = f"{path.name}, row {row}"
                if fields is None:
                    yield Failure(reason=BAD_ROW, error=f"{where}: not UTF-8")
                else:
                    yield Record(where, row, fields)
                row += 1


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | None]:
    """The rows of a batch; None instead of one with text that is not UTF-8."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            try:
                (row,) = batch.slice(i, 1).to_pylist()
            except UnicodeDecodeError:
                row = None
            yield row
