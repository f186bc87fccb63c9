"""One shard to manifest rows: each sample parsed, measured, tokenized and hashed.

The part of `vlm.data.manifest.manifest` that runs in worker processes. Not here: where the rows are
kept (`vlm.data.manifest.parts`) and the file they go to.
"""

import functools
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash
from transformers import PreTrainedTokenizerFast

from vlm.data.format import layout, schema, shards
from vlm.data.format.decode import Sampling, measure
from vlm.data.format.foreign import DEFAULT_SOURCE
from vlm.data.text import chat, encode
from vlm.errors import DataError, SampleError

COLUMNS = {
    "key": pa.string(),
    "offset": pa.uint64(),
    "length": pa.uint64(),
    "kind": pa.uint8(),
    "num_frames": pa.uint16(),
    "height": pa.uint16(),
    "width": pa.uint16(),
    "num_tokens": pa.uint32(),
    "num_answer_tokens": pa.uint32(),
    "source": pa.string(),
    "content_hash": pa.binary(16),
}
ROW_SCHEMA = pa.schema(COLUMNS)
#: licences of one source that are told apart
MAX_LICENCES = 100
MAX_LICENCE_CHARS = 100


@dataclass(frozen=True)
class Options:
    """What the rows of a shard depend on, besides its bytes."""

    tokenizer_path: str
    image_token: str
    #: side of the square that frames are brought to when they are read; None leaves them as stored
    size: int | None = None
    #: frames of video files
    sampling: Sampling = Sampling()
    #: source of samples that name none, in shards of other tools
    default_source: str = DEFAULT_SOURCE


@dataclass
class ShardRows:
    """What one shard holds."""

    num_bytes: int
    sha256: str
    batch: pa.RecordBatch
    #: one message for every sample that was left out
    rejected: list[str]
    #: number of samples by the form of their words
    forms: dict[str, int]
    #: licences that samples name, by source
    licences: dict[str, list[str]]


@dataclass
class _Found:
    """Grows while a shard is read."""

    columns: dict[str, list] = field(default_factory=lambda: {name: [] for name in COLUMNS})
    rejected: list[str] = field(default_factory=list)
    forms: Counter[str] = field(default_factory=Counter)
    licences: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))


def index_shard(shard: shards.ShardFile, path: str, options: Options) -> ShardRows:
    """The rows of an open shard, in one pass over its bytes.

    Raises:
        DataError: it is damaged, or no sample of it can be used.
    """
    tokenizer = _cached_tokenizer(options.tokenizer_path, options.image_token)
    found, digest, position = _Found(), hashlib.sha256(), 0
    for one in shards.scan_file(shard, path):
        where = describe(path, one.offset, one.key)
        # a sample too large to be read is still a part of the shard
        position = _update(digest, shard, position, one.offset)
        try:
            buffer = shards.read_range(shard.read, one.offset, one.length, where)
            digest.update(buffer)
            position += one.length
            row = _describe_sample(buffer, where, tokenizer, options, found)
        except SampleError as error:
            found.rejected.append(str(error))
            continue
        row |= {"key": one.key, "offset": one.offset, "length": one.length}
        for name, values in found.columns.items():
            values.append(row[name])
    if not found.columns["key"]:
        reason = f"the first: {found.rejected[0]}" if found.rejected else "it is empty"
        raise DataError(f"shard {path}: holds no usable sample; {reason}")
    _update(digest, shard, position, shard.num_bytes)
    return ShardRows(
        num_bytes=shard.num_bytes,
        sha256=digest.hexdigest(),
        batch=pa.RecordBatch.from_pydict(found.columns, ROW_SCHEMA),
        rejected=found.rejected,
        forms=dict(sorted(found.forms.items())),
        licences={source: sorted(names) for source, names in sorted(found.licences.items())},
    )


def _update(digest: "hashlib._Hash", shard: shards.ShardFile, begin: int, end: int) -> int:
    """Adds bytes [begin, end) of the shard; gives ``end``."""
    for chunk in shards.chunks(shard, begin, end):
        digest.update(chunk)
    return end


def _describe_sample(
    buffer: bytes | memoryview,
    where: str,
    tokenizer: PreTrainedTokenizerFast,
    options: Options,
    found: _Found,
) -> dict[str, Any]:
    """The columns that follow from a sample's content."""
    members = shards.read_members(buffer, where)
    content = layout.read_content(members, where)
    sample = content.sample
    shape = measure(content, options.size, options.sampling, where)
    try:
        branches = encode.encode_branches(tokenizer, sample, options.image_token)
        image_id = tokenizer.convert_tokens_to_ids(options.image_token)
        expanded = [chat.expand_frames(e, shape.num_frames, 1, image_id) for e in branches]
    except SampleError as error:
        raise SampleError(f"{where}: {error}") from None
    source = options.default_source if sample.source == DEFAULT_SOURCE else sample.source
    found.forms[sample.form] += 1
    _add_licence(found.licences[source], sample)
    return {
        "kind": schema.KINDS.index(sample.kind),
        "num_frames": shape.num_frames,
        "height": shape.height,
        "width": shape.width,
        "num_tokens": sum(len(e.input_ids) - shape.num_frames for e in expanded),
        "num_answer_tokens": sum(label != -100 for e in expanded for label in e.labels),
        "source": source,
        "content_hash": content_hash(members.values()),
    }


def _add_licence(licences: set[str], sample: schema.Sample) -> None:
    for name in ("licence", "license"):
        named = sample.meta.get(name)
        if isinstance(named, str) and named and len(licences) < MAX_LICENCES:
            licences.add(named[:MAX_LICENCE_CHARS])


def content_hash(bodies: Iterable[memoryview]) -> bytes:
    """16 bytes of XXH3 over a sample's members in their order: what the manifest holds.

    It is computed again whenever a sample is read, so it must cost little beside decoding; it tells
    damage, while forgery is what the shard's sha256 is for.
    """
    digest = xxhash.xxh3_128()
    for body in bodies:
        digest.update(body)
    return digest.digest()


@functools.cache
def _cached_tokenizer(path: str, image_token: str) -> PreTrainedTokenizerFast:
    """Loaded once in every worker process."""
    return chat.load_tokenizer(path, image_token)


def describe(shard: Path | str, offset: int, key: str) -> str:
    return f"{shard} at byte {offset}, key {key}"
