import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data import helpers
from tests.data.conftest import IMAGE_TOKEN
from vlm.data.format import shards
from vlm.data.format.schema import Sample, Turn
from vlm.data.manifest.rows import Options, ShardRows, index_shard
from vlm.errors import DataError

Index = Callable[..., ShardRows]


@pytest.fixture
def index(tokenizer_path: Path) -> Index:
    def run(path: Path, **options: Any) -> ShardRows:
        with shards.open_shard(path) as shard:
            return index_shard(
                shard, str(path), Options(str(tokenizer_path), IMAGE_TOKEN, **options)
            )

    return run


def test_rows_follow_the_file(index: Index, tmp_path: Path) -> None:
    (path,) = helpers.write_shards(tmp_path, [3, 0, 1])
    rows = index(path)
    table = rows.batch.to_pydict()
    found = list(shards.scan(path))
    assert table["key"] == [sample.key for sample in found]
    assert table["offset"] == [sample.offset for sample in found]
    assert table["length"] == [sample.length for sample in found]
    assert table["num_frames"] == [3, 0, 1]
    assert table["source"] == ["test"] * 3
    assert len(set(table["content_hash"])) == 3
    assert rows.num_bytes == path.stat().st_size
    assert rows.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_content_hash_follows_every_member(index: Index, tmp_path: Path) -> None:
    (path,) = helpers.write_shards(tmp_path, [1, 1, 1])
    before = index(path).batch["content_hash"].to_pylist()
    members = helpers.tar_members(path)
    other = shards.encode_jpeg(np.full((16, 16, 3), 9, np.uint8))
    helpers.write_tar(path, [(n, other if n == "00000001.000.jpg" else b) for n, b in members])
    after = index(path).batch["content_hash"].to_pylist()
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]


def write(path: Path, question: str, num_frames: int) -> Path:
    """A good text sample, then one with this question, good or not."""
    bad = Sample.model_construct(
        version=1,
        kind="video" if num_frames else "text",
        source="test",
        frame_count=num_frames,
        turns=(Turn(role="user", content=question), Turn(role="assistant", content="red")),
    )
    frames = helpers.make_frames(1, num_frames)
    with shards.ShardWriter(path, "video", 2) as writer:
        writer.write(0, helpers.make_sample(0, 0), [])
        writer.write(1, bad, frames)
    return path / "video-00000.tar"


@pytest.mark.parametrize(
    ("question", "num_frames", "fault"),
    [
        ("<|end|>", 1, "special token"),
        ("<image><image>", 3, "0 <video> and 2 <image> marks"),
        ("<video>", 0, "1 <video> and 0 <image> marks"),
        ("<video><image>", 2, "marks"),
    ],
)
def test_what_cannot_be_encoded_is_left_out(
    index: Index, tmp_path: Path, question: str, num_frames: int, fault: str
) -> None:
    path = write(tmp_path, question, num_frames)
    rows = index(path)
    assert rows.batch["key"].to_pylist() == ["00000000"]
    (message,) = rows.rejected
    assert fault in message
    assert str(path) in message and "key 00000001" in message and " at byte " in message


def test_marks_do_not_count_as_text(index: Index, tmp_path: Path) -> None:
    plain, marked = (
        index(write(tmp_path / name, question, 4)).batch["num_tokens"].to_pylist()[1]
        for name, question in (("a", "What is it?"), ("b", "What is it?<video>"))
    )
    assert plain == marked


def test_a_shard_without_a_usable_sample(index: Index, tmp_path: Path) -> None:
    path = helpers.write_tar(tmp_path / "a.tar", [("a.json", b"{}"), ("b.json", b"{}")])
    with pytest.raises(DataError, match=r"a.tar: holds no usable sample; the first: .*key a"):
        index(path)


def test_a_sample_too_large_to_be_read_is_left_out(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is never held in memory, but the shard's sha256 is that of the whole file."""
    (path,) = helpers.write_shards(tmp_path, [1, 1, 0])
    members = helpers.tar_members(path)
    large = [(n, b" " * 300_000 if n == "00000001.json" else b) for n, b in members]
    helpers.write_tar(path, large)
    monkeypatch.setattr(shards, "MAX_SAMPLE_BYTES", 100_000)
    rows = index(path)
    assert rows.batch["key"].to_pylist() == ["00000000", "00000002"]
    (message,) = rows.rejected
    assert "key 00000001" in message and "at most 100000 are read" in message
    assert rows.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
