"""Parts of a micro-batch against its samples read one by one."""

from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from tests.data import helpers
from tests.data.collators import make_collator
from tests.data.conftest import IMAGE_TOKEN
from tests.data.random_rows import make_policy
from vlm.data.load.faults import BadSamples
from vlm.data.load.reader import Reader
from vlm.data.load.samples import Samples, Wanted
from vlm.data.manifest import manifest
from vlm.data.plan import catalog
from vlm.data.plan.catalog import Catalog
from vlm.data.plan.plan import Plan
from vlm.data.plan.planning import rows_from_catalog
from vlm.errors import DataError

COUNTS = [3, 1, 4, 0, 2, 3, 1, 4, 2]


@pytest.fixture
def data(tmp_path: Path, tokenizer_path: Path) -> Catalog:
    paths = helpers.write_shards(tmp_path / "shards", COUNTS, per_shard=4)
    manifest.build(paths, str(tokenizer_path), IMAGE_TOKEN, tmp_path / "m.parquet")
    return catalog.load([("train", tmp_path / "m.parquet", 1)])


@pytest.fixture
def samples(data: Catalog, tokenizer: PreTrainedTokenizerFast) -> Samples:
    policy = make_policy(
        batching="packed", micro_batches=1, budget=200, frame_cost=2, text_frac=0.1, window=30
    )
    collator = make_collator(tokenizer, seed=1)
    plan = Plan(rows_from_catalog(data, "answers"), policy, ["fingerprint"])
    return Samples(data, plan, collator, Reader(data))


def wanted(rows: list[int]) -> list[Wanted]:
    return [Wanted(row, 0, np.zeros((COUNTS[row], 16, 16, 3), np.uint8)) for row in rows]


def damage(data: Catalog, row: int, body: bytes) -> None:
    found, own = data.locate(row)
    path = found.shards[found.shard[own]].path
    raw = path.read_bytes()
    at = raw.index(body, int(found.offset[own]))
    path.write_bytes(raw[:at] + bytes(len(body)) + raw[at + len(body) :])


@pytest.mark.parametrize("fault", [b'"version"', b"\xff\xd8\xff"])
def test_a_bad_one_is_replaced_and_its_neighbours_stay(
    data: Catalog, samples: Samples, fault: bytes
) -> None:
    good = {row: Reader(data).read(row).frames for row in range(len(COUNTS))}
    damage(data, 2, fault)
    part = wanted([5, 2, 7, 3, 0, 5])
    loaded = samples.load(part, {}, BadSamples(data, 1.0, None))
    assert [one.row for one in loaded[:1] + loaded[2:]] == [5, 7, 3, 0, 5]
    assert all(not one.faults for i, one in enumerate(loaded) if i != 1)
    stand_in = loaded[1]
    assert stand_in.row != 2 and [found.row for found in stand_in.faults] == [2]
    for own, one in zip(part, loaded, strict=True):
        frames = own.out[: one.num_frames]
        assert np.array_equal(frames, good[one.row].reshape(frames.shape))


def test_what_was_found_bad_before_is_not_read_again(data: Catalog, samples: Samples) -> None:
    loaded = samples.load(wanted([0, 4]), {}, BadSamples(data, 1.0, None, [4]))
    assert loaded[0].row == 0 and loaded[1].row not in (0, 4)
    assert [found.message for found in loaded[1].faults] == ["found bad before"]


def test_none_is_good(data: Catalog, samples: Samples) -> None:
    everything = BadSamples(data, 1.0, None, range(len(COUNTS)))
    with pytest.raises(DataError, match="it is bad, and none of .* substitutes is good"):
        samples.load(wanted([1]), {}, everything)


def test_another_thread_may_clear_the_kept_tokens(data: Catalog, samples: Samples) -> None:
    class Cleared(dict):
        def __contains__(self, name: object) -> bool:
            found = super().__contains__(name)
            self.clear()
            return found

    samples._tokens = Cleared()
    bad = BadSamples(data, 1.0, None)
    first, again = (samples.load(wanted([3]), {}, bad) for _ in range(2))
    assert [one.encoded for one in first] == [one.encoded for one in again]
