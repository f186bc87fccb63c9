import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlm.data.manifest import manifest_file
from vlm.data.manifest.manifest_file import Header, Shard, Source, Tokenizer, Vision
from vlm.data.manifest.rows import ROW_SCHEMA
from vlm.errors import DataError


def header(num_samples: int = 1) -> Header:
    return Header(
        version=3,
        tokenizer=Tokenizer(name="t", sha256="0"),
        vision=Vision(size=None, fps=1.0, max_frames=64),
        shards=[Shard(path="a.tar", bytes=1, sha256="0", num_samples=num_samples)],
        sources=[Source(name="s", num_samples=num_samples, licences=["MIT"])],
        forms={"turns": num_samples},
        fingerprint="0",
    )


def rows(num_rows: int, random_keys: bool = False, seed: int = 0) -> pa.RecordBatch:
    """As of 1 to 64 frames of about 17 kB, some hundred tokens and a dozen sources."""
    rng = np.random.default_rng(seed)
    frames = np.exp(rng.uniform(0, np.log(64.99), num_rows)).astype(int)
    length = (
        1024 * (frames + 1) + frames * rng.normal(16_800, 2000, num_rows).astype(int) // 512 * 512
    )
    tokens = np.exp(rng.normal(5, 1, num_rows)).astype(int) + 1
    columns = {
        "key": [rng.bytes(8).hex() if random_keys else f"{i:08d}" for i in range(num_rows)],
        "offset": np.concatenate([[0], np.cumsum(length)[:-1]]),
        "length": length,
        "kind": np.where(frames > 1, 2, 1),
        "num_frames": frames,
        "height": np.full(num_rows, 224),
        "width": np.full(num_rows, 224),
        "num_tokens": tokens,
        "num_answer_tokens": (tokens * rng.uniform(0.2, 0.9, num_rows)).astype(int),
        "source": [f"source-{i}" for i in rng.integers(0, 12, num_rows)],
        "content_hash": [rng.bytes(16) for _ in range(num_rows)],
    }
    return pa.RecordBatch.from_pydict(columns, ROW_SCHEMA)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    output = tmp_path / "folder" / "m.parquet"
    first, second = rows(3), rows(2)
    with manifest_file.open_writer(output) as writer:
        writer.add(0, first)
        writer.add(1, second)
        assert not output.exists()
        writer.close(header(5))
    found, table = manifest_file.read(output, manifest_file.ARROW_SCHEMA.names)
    assert found == header(5)
    assert table["shard"].to_pylist() == [0, 0, 0, 1, 1]
    expected = pa.Table.from_batches([first, second])
    assert table.drop_columns(["shard"]).equals(expected)
    assert json.loads(pq.read_schema(output).metadata[b"saccade"])["version"] == 3


@pytest.mark.parametrize("random_keys", [False, True])
def test_a_sample_takes_at_most_40_bytes(tmp_path: Path, random_keys: bool) -> None:
    """docs/shard-format.md says so; the content hash alone is 16."""
    num_rows, output = 50_000, tmp_path / "m.parquet"
    with manifest_file.open_writer(output) as writer:
        for shard in range(5):
            writer.add(shard, rows(num_rows // 5, random_keys, shard))
        writer.close(header(num_rows))
    assert 20 < output.stat().st_size / num_rows < 40


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), manifest_file.open_writer(tmp_path / "m.parquet") as writer:
        writer.add(0, rows(3))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_rows_come_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_file, "ROWS_PER_GROUP", 10)
    output = tmp_path / "m.parquet"
    with manifest_file.open_writer(output) as writer:
        for shard in range(5):
            writer.add(shard, rows(6))
        writer.close(header(30))
    metadata = pq.read_metadata(output)
    assert [metadata.row_group(i).num_rows for i in range(3)] == [12, 12, 6]


def test_another_version_is_named(tmp_path: Path) -> None:
    output = tmp_path / "m.parquet"
    old = header().model_copy(update={"version": 1})
    with manifest_file.open_writer(output) as writer:
        writer.add(0, rows(1))
        writer.close(old)
    with pytest.raises(DataError, match=r"m.parquet: version: .*build_manifest"):
        manifest_file.read(output, ["key"])
