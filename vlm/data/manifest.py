"""The manifest: one Parquet row for every usable sample of a set of shards, built once, offline.

What happens in ``build``, one shard to a task:

1. ``shards.scan`` finds each sample's byte range; one read gets it.
2. The sample is parsed, its frames are counted and measured, its conversation is tokenized.
3. A sample that cannot be used is left out and reported; too many of them stop the build.
4. Rows are written in the order of the shards, so the file does not depend on the workers.

Not here: which samples are read when (`vlm.data.plan`), reading them (the loader).
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from vlm.data import chat, schema, shards
from vlm.data.pool import ordered_map
from vlm.data.rows import ARROW_SCHEMA, Task, describe, index_shard
from vlm.errors import DataError

VERSION: Final = 1
METADATA_KEY = "saccade"
#: a larger share of unusable samples is not bad luck but a mistake
MAX_REJECTED_FRAC = 0.01
ROWS_PER_GROUP = 131_072
PLANNING_COLUMNS = (
    "num_frames",
    "num_tokens",
    "num_answer_tokens",
    "kind",
    "shard",
    "height",
    "width",
)


@dataclass(frozen=True)
class ShardInfo:
    path: Path
    bytes: int
    sha256: str
    num_samples: int


@dataclass(frozen=True)
class Summary:
    """What a build found."""

    num_shards: int
    num_samples: int
    num_frames: int
    num_tokens: int
    num_answer_tokens: int
    fingerprint: str
    #: one message for every sample that was left out
    rejected: list[str]


@dataclass(frozen=True)
class Manifest:
    """A loaded manifest; array entry i and row i of the file are sample i."""

    path: Path
    shards: list[ShardInfo]
    #: changes with the samples, their order and the tokenizer, not with where the shards lie
    fingerprint: str
    tokenizer_sha256: str
    #: all (num_samples,) uint32
    num_frames: np.ndarray
    num_tokens: np.ndarray
    num_answer_tokens: np.ndarray
    kind: np.ndarray
    shard: np.ndarray
    height: np.ndarray
    width: np.ndarray

    @property
    def num_samples(self) -> int:
        return len(self.kind)

    @functools.cached_property
    def offset(self) -> np.ndarray:
        """(num_samples,) uint64, where a sample starts in its shard."""
        return self._column("offset").to_numpy()

    @functools.cached_property
    def length(self) -> np.ndarray:
        """(num_samples,) uint64, bytes of its headers, members and padding."""
        return self._column("length").to_numpy()

    @functools.cached_property
    def _keys(self) -> pa.Array:
        return self._column("key").combine_chunks()

    def key(self, row: int) -> str:
        return self._keys[int(row)].as_py()

    def keys(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        return self._keys.take(pa.array(rows)).to_pylist()

    def where(self, row: int) -> str:
        """Shard, byte and key of a sample, for errors."""
        shard = self.shards[self.shard[row]].path
        return describe(shard, int(self.offset[row]), self.key(row))

    def check_shards(self) -> None:
        """Raises DataError when a shard is missing or has another size than it had."""
        faults = []
        for shard in self.shards:
            if not shard.path.is_file():
                faults.append(f"{shard.path} is missing")
            elif (found := shard.path.stat().st_size) != shard.bytes:
                faults.append(f"{shard.path} has {found} bytes, expected {shard.bytes}")
        if faults:
            raise DataError(
                f"manifest {self.path}: {len(faults)} of {len(self.shards)} shards do not fit: "
                f"{'; '.join(faults[:3])}; build the manifest again, or bring them back"
            )

    def _column(self, name: str) -> pa.ChunkedArray:
        return _read(self.path, (name,))[1][name]


def build(
    shard_paths: Sequence[Path],
    tokenizer_path: str,
    image_token: str,
    output: Path,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Writes the manifest of ``shard_paths``, in their order, to ``output``.

    Args:
        progress: Called with (shards done, shards in all).

    Raises:
        DataError: a damaged, empty or foreign shard, or too many unusable samples. Nothing is
            written then.
        ConfigError: the tokenizer cannot be used.
    """
    if not shard_paths:
        raise DataError("no shards to build a manifest of")
    chat.load_tokenizer(tokenizer_path, image_token)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    tasks = [
        Task(index, path, str(tokenizer_path), image_token)
        for index, path in enumerate(shard_paths)
    ]
    try:
        with pq.ParquetWriter(
            temporary,
            ARROW_SCHEMA,
            compression="zstd",
            use_dictionary=["source"],
            write_page_checksum=True,
            # a stored Arrow schema would hide the metadata that is only known at the end
            store_schema=False,
        ) as writer:
            summary = _write(writer, tasks, output, workers, progress)
        shards.publish(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    return summary


def load(path: Path) -> Manifest:
    """Reads the planning columns.

    Raises:
        DataError: no such file, not a manifest, or a damaged one.
    """
    header, table = _read(path, PLANNING_COLUMNS)
    columns = {name: table[name].to_numpy().astype(np.uint32) for name in PLANNING_COLUMNS}
    folder = os.path.abspath(path.parent)
    infos = [
        ShardInfo(Path(os.path.normpath(f"{folder}/{s.path}")), s.bytes, s.sha256, s.num_samples)
        for s in header.shards
    ]
    counts = np.bincount(columns["shard"], minlength=len(infos))
    if counts.tolist() != [info.num_samples for info in infos]:
        raise DataError(f"manifest {path}: its rows do not fit its shard table; build it again")
    return Manifest(
        path=path,
        shards=infos,
        fingerprint=header.fingerprint,
        tokenizer_sha256=header.tokenizer.sha256,
        **columns,
    )


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _TokenizerHeader(_Strict):
    name: str
    sha256: str


class _ShardHeader(_Strict):
    path: str
    bytes: int
    sha256: str
    num_samples: int


class _Header(_Strict):
    version: Literal[1]
    tokenizer: _TokenizerHeader
    shards: list[_ShardHeader]
    fingerprint: str


def _write(
    writer: pq.ParquetWriter,
    tasks: list[Task],
    output: Path,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> Summary:
    """Runs the tasks, writes their rows in order and the header last."""
    name = tasks[0].tokenizer_path
    tokenizer = _TokenizerHeader(name=name, sha256=chat.tokenizer_fingerprint(name))
    digest = hashlib.sha256(json.dumps([VERSION, tokenizer.sha256]).encode())
    folder = os.path.abspath(output.parent)
    table: list[_ShardHeader] = []
    rejected: list[str] = []
    pending: list[pa.RecordBatch] = []
    totals = dict.fromkeys(("num_frames", "num_tokens", "num_answer_tokens"), 0)
    for task, rows in zip(tasks, ordered_map(index_shard, tasks, workers), strict=True):
        path = os.path.relpath(os.path.abspath(task.path), folder)
        table.append(
            _ShardHeader(
                path=path, bytes=rows.bytes, sha256=rows.sha256, num_samples=len(rows.batch)
            )
        )
        digest.update(json.dumps([rows.bytes, rows.sha256, len(rows.batch)]).encode())
        for column in PLANNING_COLUMNS:
            digest.update(rows.batch[column].to_numpy().tobytes())
        for column in totals:
            totals[column] += int(rows.batch[column].to_numpy().sum(dtype=np.int64))
        rejected += rows.rejected
        pending.append(rows.batch)
        if sum(map(len, pending)) >= ROWS_PER_GROUP:
            writer.write_table(pa.Table.from_batches(pending))
            pending = []
        if progress is not None:
            progress(len(table), len(tasks))
    if pending:
        writer.write_table(pa.Table.from_batches(pending))
    num_samples = sum(shard.num_samples for shard in table)
    _check_rejected(rejected, num_samples)
    header = _Header(
        version=VERSION, tokenizer=tokenizer, shards=table, fingerprint=digest.hexdigest()
    )
    writer.add_key_value_metadata({METADATA_KEY: header.model_dump_json()})
    return Summary(
        num_shards=len(table),
        num_samples=num_samples,
        fingerprint=header.fingerprint,
        rejected=rejected,
        **totals,
    )


def _check_rejected(rejected: list[str], num_samples: int) -> None:
    if len(rejected) > MAX_REJECTED_FRAC * (num_samples + len(rejected)):
        raise DataError(
            f"{len(rejected)} of {num_samples + len(rejected)} samples cannot be used, at most "
            f"{MAX_REJECTED_FRAC:.0%} may be left out; the first: {rejected[0]}; see "
            "validate_shards for all"
        )


def _read(path: Path, columns: Sequence[str]) -> tuple[_Header, pa.Table]:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            metadata = file.schema_arrow.metadata or {}
            header = _Header.model_validate_json(metadata.get(METADATA_KEY.encode(), b"{}"))
            if not file.schema_arrow.equals(ARROW_SCHEMA):
                raise pa.ArrowInvalid(f"its columns are {', '.join(file.schema_arrow.names)}")
            return header, file.read(columns=list(columns))
    except FileNotFoundError:
        reason = "no such file"
    except ValidationError as error:
        reason = schema.explain(error)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
    raise DataError(f"manifest {path}: {reason}; expected a whole file written by build_manifest")
