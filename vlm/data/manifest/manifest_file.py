"""The Parquet file of a manifest: its columns, its header, how both are written and read.

Not here: how rows come about (`vlm.data.manifest.rows`) and what is done with them
(`vlm.data.manifest.manifest`).
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from vlm.data.format import schema, shards
from vlm.data.manifest.rows import ROW_SCHEMA
from vlm.errors import DataError

VERSION: Final = 3
METADATA_KEY = "saccade"
ARROW_SCHEMA = ROW_SCHEMA.insert(1, pa.field("shard", pa.uint32()))
PLANNING_COLUMNS = (
    "num_frames",
    "num_tokens",
    "num_answer_tokens",
    "kind",
    "shard",
    "height",
    "width",
)
ROWS_PER_GROUP = 131_072


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Tokenizer(_Strict):
    name: str
    sha256: str


class Vision(_Strict):
    """How frames are made when they are read."""

    #: side of the square that they are brought to; None leaves them as stored
    size: int | None
    #: of video files
    fps: float
    max_frames: int


class Shard(_Strict):
    #: from the manifest's folder
    path: str
    bytes: int
    sha256: str
    num_samples: int


class Source(_Strict):
    name: str
    num_samples: int
    #: those that its samples name
    licences: list[str]


class Header(_Strict):
    version: Literal[3]
    tokenizer: Tokenizer
    vision: Vision
    shards: list[Shard]
    sources: list[Source]
    #: number of samples by the form of their words
    forms: dict[str, int]
    fingerprint: str


class Writer:
    """Collects rows in groups; the header comes last."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self._writer = writer
        self._pending: list[pa.RecordBatch] = []

    def add(self, shard: int, rows: pa.RecordBatch) -> None:
        """Appends the rows of the shard with this index."""
        column = pa.repeat(pa.scalar(shard, pa.uint32()), len(rows))
        arrays = [column if name == "shard" else rows[name] for name in ARROW_SCHEMA.names]
        self._pending.append(pa.RecordBatch.from_arrays(arrays, schema=ARROW_SCHEMA))
        if sum(map(len, self._pending)) >= ROWS_PER_GROUP:
            self._flush()

    def close(self, header: Header) -> None:
        self._flush()
        self._writer.add_key_value_metadata({METADATA_KEY: header.model_dump_json()})

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_table(pa.Table.from_batches(self._pending))
            self._pending = []


@contextmanager
def open_writer(output: Path) -> Iterator[Writer]:
    """A manifest under a temporary name, which gets its own when the block ends without error."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
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
            yield Writer(writer)
        shards.publish(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path, columns: Sequence[str]) -> tuple[Header, pa.Table]:
    """The header and some columns.

    Raises:
        DataError: no such file, not a manifest, or a damaged one.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            metadata = file.schema_arrow.metadata or {}
            header = Header.model_validate_json(metadata.get(METADATA_KEY.encode(), b"{}"))
            if not file.schema_arrow.equals(ARROW_SCHEMA):
                raise pa.ArrowInvalid(f"its columns are {', '.join(file.schema_arrow.names)}")
            return header, file.read(columns=list(columns))
    except FileNotFoundError:
        reason = "no such file"
    except ValidationError as error:
        reason = schema.explain(error)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
    raise DataError(
        f"manifest {path}: {reason}; expected a whole file that this version's build_manifest "
        "wrote; build it again"
    )
