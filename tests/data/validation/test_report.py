import random
from collections import Counter
from pathlib import Path

import pytest

from tests.data import helpers
from vlm.data.validation import report
from vlm.data.validation.report import ShardReport, Tally, Text


def test_tallies_add_up_to_what_a_loop_counts() -> None:
    rng = random.Random(0)
    parts = [Tally(), Tally()]
    frames: Counter[str] = Counter()
    for i in range(200):
        count = rng.choice([0, 1, 4, 5, 8, 9, 16, 17, 32, 33, 64])
        text = Text(rng.randint(1, 2000), 1)
        size = (16, 16) if count else (0, 0)
        parts[i % 2].add(helpers.make_sample(i, count), count, size, 1000 + i, text)
        low_high = [(0, 0), (1, 4), (5, 8), (9, 16), (17, 32), (33, 64)]
        frames[next(f"{a}-{b}" if a < b else str(a) for a, b in low_high if a <= count <= b)] += 1
    total = Tally()
    for part in parts:
        total.update(part)
    found = total.as_json()
    assert found["frames"] == frames
    assert found["num_samples"] == 200
    assert found["num_bytes"] == sum(range(1000, 1200))
    assert found["bytes"] == {"512-1,023": 24, "1,024-2,047": 176}
    assert sum(found["tokens"].values()) == 200
    assert found["supervised_frac"] == pytest.approx(200 / found["num_tokens"])
    assert found["sizes"] == {"16x16": 200 - frames["0"]}


def test_buckets_meet_without_a_gap() -> None:
    total = Tally()
    for tokens in (0, 1, 2, 3, 4, 1023, 1024):
        total.add(helpers.make_sample(0, 0), 0, (0, 0), 1, Text(tokens, 0))
    labels = list(total.as_json()["tokens"])
    assert labels[:4] == ["0", "1", "2-3", "4-7"]
    assert labels[-2:] == ["512-1,023", "1,024-2,047"]
    assert total.as_json()["tokens"]["8-15"] == 0


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MAX_SOURCES", 2)
    sources: dict[str, Tally] = {}
    for name in ("a", "b", "c", "d", "a"):
        report.add_source(sources, name).num_samples += 1
    assert {name: tally.num_samples for name, tally in sources.items()} == {
        "a": 2,
        "b": 1,
        report.OTHER_SOURCES: 2,
    }
    monkeypatch.setattr(report, "MAX_SHARD_FAULTS", 3)
    shard = ShardReport(Path("x.tar"))
    for i in range(5):
        shard.fault("schema", str(i), "", "bad")
    assert [fault.key for fault in shard.faults] == ["0", "1", "2"]
    assert shard.num_dropped_faults == 2
    assert shard.faulty == set("01234"), "none of them gets into a clean copy"
    total = Tally()
    for side in range(1, 31):
        total.add(helpers.make_sample(0, 1), 1, (side, side), 1, None)
    sizes = total.as_json()["sizes"]
    assert len(sizes) == report.MAX_SIZES + 1 and sizes["other"] == 10
    assert total.as_json()["supervised_frac"] is None


def test_keys_come_back_as_they_were() -> None:
    shard = ShardReport(Path("x.tar"))
    keys = ["a", "", "caf\u00e9", "00000012"]
    for key in keys:
        shard.add(key, (1, 2), bytes(16), bytes(16))
    assert [shard.key(row) for row in range(shard.num_samples)] == keys
    assert report.digest_rows([shard, shard], "key").shape == (8, 2)
