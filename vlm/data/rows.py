"""One shard to manifest rows: each sample parsed, measured, tokenized and hashed.

The part of `vlm.data.manifest` that runs in worker processes. Not here: the file the rows go to.
"""

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from transformers import PreTrainedTokenizerFast

from vlm.data import chat, schema, shards
from vlm.errors import DataError, SampleError

ARROW_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.uint32()),
        ("offset", pa.uint64()),
        ("length", pa.uint64()),
        ("kind", pa.uint8()),
        ("num_frames", pa.uint16()),
        ("height", pa.uint16()),
        ("width", pa.uint16()),
        ("num_tokens", pa.uint32()),
        ("num_answer_tokens", pa.uint32()),
        ("source", pa.string()),
        ("content_hash", pa.binary(16)),
    ]
)


@dataclass(frozen=True)
class Task:
    index: int
    path: Path
    tokenizer_path: str
    image_token: str


@dataclass
class ShardRows:
    bytes: int
    sha256: str
    batch: pa.RecordBatch
    #: one message for every sample that was left out
    rejected: list[str]


def index_shard(task: Task) -> ShardRows:
    """The rows of a shard.

    Raises:
        DataError: it is damaged, or no sample of it can be used.
    """
    tokenizer = _cached_tokenizer(task.tokenizer_path, task.image_token)
    columns: dict[str, list] = {name: [] for name in ARROW_SCHEMA.names}
    rejected = []
    for found, buffer in _read_shard(task.path):
        where = describe(task.path, found.offset, found.key)
        try:
            row = _describe_sample(buffer, where, tokenizer, task.image_token)
        except SampleError as error:
            rejected.append(str(error))
            continue
        row |= {"key": found.key, "shard": task.index}
        row |= {"offset": found.offset, "length": found.length}
        for name, values in columns.items():
            values.append(row[name])
    if not columns["key"]:
        reason = f"the first: {rejected[0]}" if rejected else "it is empty"
        raise DataError(f"shard {task.path}: holds no usable sample; {reason}")
    with task.path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    batch = pa.RecordBatch.from_pydict(columns, ARROW_SCHEMA)
    return ShardRows(task.path.stat().st_size, sha256, batch, rejected)


def _read_shard(path: Path) -> Iterator[tuple[shards.SampleRange, bytes]]:
    with path.open("rb") as file:
        for found in shards.scan(path):
            where = describe(path, found.offset, found.key)
            yield found, shards.read_range(file.fileno(), found.offset, found.length, where)


def _describe_sample(
    buffer: bytes, where: str, tokenizer: PreTrainedTokenizerFast, image_token: str
) -> dict[str, object]:
    """The columns that follow from a sample's content."""
    members = shards.read_members(buffer, where)
    sample, frames = shards.parse_members(members, where)
    shapes = {
        shards.frame_shape(jpeg, f"{where}, frame {i:03d}") for i, jpeg in enumerate(frames)
    } or {(0, 0)}
    if len(shapes) > 1:
        raise SampleError(f"{where}: frames of several sizes {sorted(shapes)}; expected one")
    height, width = shapes.pop()
    try:
        encoded = chat.encode(tokenizer, sample.conversation(), image_token)
        image_id = tokenizer.convert_tokens_to_ids(image_token)
        expanded = chat.expand_frames(encoded, sample.frame_count, 1, image_id)
    except SampleError as error:
        raise SampleError(f"{where}: {error}") from None
    content = hashlib.blake2b(digest_size=16)
    for body in members.values():
        content.update(body)
    return {
        "kind": schema.KINDS.index(sample.kind),
        "num_frames": sample.frame_count,
        "height": height,
        "width": width,
        "num_tokens": len(expanded.input_ids) - sample.frame_count,
        "num_answer_tokens": sum(label != -100 for label in expanded.labels),
        "source": sample.source,
        "content_hash": content.digest(),
    }


@functools.cache
def _cached_tokenizer(path: str, image_token: str) -> PreTrainedTokenizerFast:
    """Loaded once in every worker process."""
    return chat.load_tokenizer(path, image_token)


def describe(shard: Path, offset: int, key: str) -> str:
    return f"{shard} at byte {offset}, key {key}"
