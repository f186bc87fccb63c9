from pathlib import Path
from typing import Any

import pytest

from tests.data.manifest.test_manifest_file import rows
from vlm.data.format.decode import Sampling
from vlm.data.manifest.manifest_tally import Tally
from vlm.data.manifest.rows import Options, ShardRows
from vlm.errors import DataError

ROOT = Path("/data")


def tally(**options: Any) -> Tally:
    return Tally(ROOT / "m.parquet", Options("tokenizer", "<|image|>", **options), "abc")


def shard(num_rows: int, **changes: Any) -> ShardRows:
    found = {
        "num_bytes": 100 * num_rows,
        "sha256": f"{num_rows}",
        "batch": rows(num_rows),
        "rejected": [],
        "forms": {"turns": num_rows},
        "licences": {},
    }
    return ShardRows(**(found | changes))


def test_shards_add_up() -> None:
    total = tally()
    first = shard(3, licences={"source-1": ["MIT", "CC0"]}, forms={"turns": 1, "caption": 2})
    second = shard(5, rejected=["bad"], licences={"source-1": ["MIT"]})
    total.add(str(ROOT / "s/a.tar"), first, is_new=True)
    total.add(str(ROOT.parent / "b.tar"), second, is_new=False)
    header, summary = total.header(), total.summary()
    assert [(s.path, s.bytes, s.num_samples) for s in header.shards] == [
        ("s/a.tar", 300, 3),
        ("../b.tar", 500, 5),
    ]
    assert header.forms == {"caption": 2, "turns": 6}
    sources = [name for r in (first, second) for name in r.batch["source"].to_pylist()]
    assert {s.name: s.num_samples for s in header.sources} == {n: sources.count(n) for n in sources}
    assert {s.name: s.licences for s in header.sources}["source-1"] == ["CC0", "MIT"]
    assert (summary.num_shards, summary.num_read, summary.num_samples) == (2, 1, 8)
    for column in ("num_frames", "num_tokens", "num_answer_tokens"):
        expected = sum(sum(r.batch[column].to_pylist()) for r in (first, second))
        assert summary.__dict__[column] == expected
    assert summary.rejected == ["bad"]


def test_the_fingerprint_follows_what_training_sees() -> None:
    def fingerprint(own: Tally, *shards: ShardRows, path: str = "a.tar") -> str:
        for one in shards:
            own.add(str(ROOT / path), one, is_new=True)
        return own.header().fingerprint

    first = fingerprint(tally(), shard(3), shard(4))
    assert fingerprint(tally(), shard(3), shard(4), path="elsewhere.tar") == first
    assert fingerprint(tally(default_source="x"), shard(3), shard(4)) == first
    others = [
        fingerprint(tally(), shard(4), shard(3)),
        fingerprint(tally(), shard(3)),
        fingerprint(tally(size=224), shard(3), shard(4)),
        fingerprint(tally(sampling=Sampling(2.0, 64)), shard(3), shard(4)),
        fingerprint(tally(), shard(3), shard(4, sha256="other")),
        fingerprint(Tally(ROOT / "m", tally().options, "other"), shard(3), shard(4)),
    ]
    assert len({first, *others}) == 1 + len(others)


def test_parts_are_told_apart_by_what_rows_depend_on(tmp_path: Path) -> None:
    def hash_of(**options: Any) -> str:
        own = Tally(tmp_path / "m.parquet", Options("tokenizer", "<|image|>", **options), "abc")
        (task,) = own.tasks([str(tmp_path / "s/a.tar")])
        assert task.part.parent == tmp_path / "m.parquet.parts"
        return task.options_hash

    hashes = [
        hash_of(),
        hash_of(size=224),
        hash_of(sampling=Sampling(2.0, 64)),
        hash_of(default_source="x"),
    ]
    assert len(set(hashes)) == 4
    assert hash_of() == hashes[0]


def test_few_samples_may_be_left_out() -> None:
    total = tally()
    total.add("/data/a.tar", shard(98, rejected=["the first", "the second"]), is_new=True)
    total.check_rejected(0.02)
    with pytest.raises(DataError, match=r"2 of 100 samples .* at most 1%.*the first: the first"):
        total.check_rejected(0.01)
