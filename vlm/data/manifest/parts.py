"""Rows of single shards, kept beside the manifest that is made of them.

    train.parquet          the manifest
    train.parquet.parts/   one file for each shard: its rows, and what they were made from

A build that was killed goes on with the shards that are missing here, and a later one reads only
shards that changed. The folder may be deleted at any time. Not here: how rows come about
(`vlm.data.manifest.rows`).
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from vlm.data.format import shards
from vlm.data.manifest.rows import ROW_SCHEMA, Options, ShardRows, index_shard
from vlm.data.storage import locations, remote

_METADATA_KEY = b"saccade"


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    #: of everything but the shard that the rows depend on
    options_hash: str
    #: of the shard, when it was read
    version: str
    num_bytes: int
    sha256: str
    rejected: list[str]
    forms: dict[str, int]
    licences: dict[str, list[str]]


@dataclass(frozen=True)
class Task:
    """One shard whose rows are wanted."""

    #: an absolute path, or a URL
    shard: str
    part: Path
    options: Options
    options_hash: str


class Made(NamedTuple):
    """Where the rows of a shard are, and whether the shard had to be read for them."""

    part: Path
    is_new: bool


def folder_of(output: Path) -> Path:
    return output.with_name(f"{output.name}.parts")


def part_name(shard: str) -> str:
    """The name of a shard's part; ``shard`` is its path from the manifest's folder."""
    return f"{hashlib.blake2b(os.fsencode(shard), digest_size=16).hexdigest()}.parquet"


def make(task: Task) -> Made:
    """Makes the part of a shard, unless it is there and the shard has not changed.

    A shard with the size and time it had is taken as unchanged; with another time but the same
    size, its sha256 decides.

    Raises:
        DataError: see ``rows.index_shard``.
    """
    with locations.open_shard(task.shard) as shard:
        known = _read(task.part)
        fits = (
            known is not None
            and known[0].options_hash == task.options_hash
            and known[0].num_bytes == shard.num_bytes
        )
        if known is not None and fits and known[0].version == shard.version != "":
            return Made(task.part, is_new=False)
        if known is not None and fits and known[0].sha256 == _sha256(shard):
            _write(task, shard.version, _rows(*known))
            return Made(task.part, is_new=False)
        _write(task, shard.version, index_shard(shard, remote.display(task.shard), task.options))
    return Made(task.part, is_new=True)


def load(part: Path) -> ShardRows:
    """The rows that ``make`` left."""
    known = _read(part)
    assert known is not None, f"{part} was just made"
    return _rows(*known)


def prune(folder: Path, wanted: set[Path]) -> None:
    """Deletes parts of shards that are not in the manifest any more."""
    for path in folder.iterdir():
        if path not in wanted:
            path.unlink()


def _read(part: Path) -> tuple[_Header, pa.Table] | None:
    """None if there is no such part, a damaged one, or one of another version of ours."""
    if not part.exists():
        return None
    try:
        with pq.ParquetFile(part, page_checksum_verification=True) as file:
            table = file.read()
        raw = (table.schema.metadata or {}).get(_METADATA_KEY, b"{}")
        header = _Header.model_validate_json(raw)
    except (OSError, pa.ArrowException, ValidationError):
        return None
    return (header, table) if table.schema.equals(ROW_SCHEMA) else None


def _write(task: Task, version: str, rows: ShardRows) -> None:
    header = _Header(
        options_hash=task.options_hash,
        version=version,
        num_bytes=rows.num_bytes,
        sha256=rows.sha256,
        rejected=rows.rejected,
        forms=rows.forms,
        licences=rows.licences,
    )
    # the process id keeps two builds from writing into each other's file
    temporary = task.part.with_name(f".{task.part.name}.{os.getpid()}.tmp")
    table = pa.Table.from_batches([rows.batch])
    table = table.replace_schema_metadata({_METADATA_KEY: header.model_dump_json()})
    pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
    shards.publish(temporary, task.part)


def _rows(header: _Header, table: pa.Table) -> ShardRows:
    (batch,) = table.combine_chunks().to_batches()
    return ShardRows(
        num_bytes=header.num_bytes,
        sha256=header.sha256,
        batch=batch,
        rejected=header.rejected,
        forms=header.forms,
        licences=header.licences,
    )


def _sha256(shard: shards.ShardFile) -> str:
    digest = hashlib.sha256()
    for chunk in shards.chunks(shard, 0, shard.num_bytes):
        digest.update(chunk)
    return digest.hexdigest()
