"""Every kind of damage through the whole loader: named, counted, replaced alike everywhere."""

import hashlib
import io
import itertools
import json
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import webdataset
from transformers import PreTrainedTokenizerFast

from tests.data import damage, helpers
from tests.data.collators import make_collator
from tests.data.conftest import IMAGE_TOKEN
from tests.data.random_rows import make_policy
from vlm.batch import Batch
from vlm.config import AugmentConfig, DataConfig
from vlm.data.load.loader import LoadedStep, Loader
from vlm.data.manifest import manifest
from vlm.data.plan import catalog
from vlm.data.plan.catalog import Catalog
from vlm.data.plan.plan import Plan
from vlm.data.plan.planning import rows_from_catalog
from vlm.errors import DataError

#: 14 samples of 5 to 8 frames a shard, and text; the last shard is cut short
COUNTS = [5 + i % 4 for i in range(56)] + [0] * 10
PER_SHARD = 14
STEPS = 8
#: damage -> row
BAD = {name: 3 * i for i, name in enumerate(n for n in damage.DAMAGE if n != "truncated")}
BAD["truncated"] = 50


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Catalog:
    folder = tmp_path_factory.mktemp("bad")
    paths = helpers.write_shards(folder / "shards", COUNTS, PER_SHARD)
    manifest.build(paths, str(tokenizer_path), IMAGE_TOKEN, folder / "m.parquet")
    found = catalog.load([("train", folder / "m.parquet", 1)])
    assert max(BAD.values()) < 56 and len(set(BAD.values())) == len(damage.DAMAGE)
    damage.spoil(found, BAD)
    return found


def bad_rows() -> set[int]:
    # what lies behind the cut, too
    return set(BAD.values()) | set(range(50, 56))


@pytest.fixture
def start(
    data: Catalog, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Callable[..., Loader]:
    def make(found: Catalog = data, threads: int = 2, frac: float = 1.0, **kw: Any) -> Loader:
        policy = make_policy(
            seed=5, batching="packed", budget=150, frame_cost=2, text_frac=0.1, window=30
        )
        config = DataConfig(
            train="unused",
            eval="unused",
            micro_batches=8,
            budget=150,
            decode_threads=threads,
            max_bad_frac=frac,
        )
        collator = make_collator(tokenizer, seed=5, augment=AugmentConfig(shift_px=2, contrast=0.1))
        plan = Plan(rows_from_catalog(found, "answers"), policy, ["fingerprint"])
        kw = {"rank": 0, "world_size": 1, "bad_samples": tmp_path / "bad_samples.jsonl"} | kw
        return Loader(found, plan, collator, config, **kw)

    return make


def take(loader: Loader, count: int = STEPS) -> list[LoadedStep]:
    with closing(iter(loader)) as steps:  # type: ignore[type-var]
        return list(itertools.islice(steps, count))


def digests(batch: Batch) -> list[str]:
    """Of each sample: key, pixels, tokens and labels."""
    found = []
    for i, key in enumerate(batch.keys):
        frames = batch.frames[batch.cu_frames[i] : batch.cu_frames[i + 1]].contiguous()
        own = slice(int(batch.cu_seqlens[i]), int(batch.cu_seqlens[i + 1]))
        parts = (frames, batch.input_ids[own], batch.labels[own])
        text = b"".join(part.numpy().tobytes() for part in parts)
        found.append(f"{key} {hashlib.sha256(text).hexdigest()}")
    return found


def content(steps: list[LoadedStep]) -> list[list[list[str]]]:
    return [[digests(batch) for batch in step.batches] for step in steps]


def log_of(path: Path) -> dict[int, dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["row"] for line in lines}) == len(lines), "each is named once"
    return {line["row"]: line for line in lines}


def test_every_damage_is_named_and_replaced(
    data: Catalog, start: Callable[..., Loader], tmp_path: Path
) -> None:
    steps = take(start(), 3 * STEPS)
    shown = {key for step in steps for batch in step.batches for key in batch.keys}
    found = log_of(tmp_path / "bad_samples.jsonl")
    assert set(found) >= bad_rows(), "three epochs meet every row"
    assert not {data.key(row) for row in found} & shown
    assert steps[-1].quarantine == tuple(sorted(found))
    for name, row in BAD.items():
        line, at = found[row], damage.place(data, row)
        assert (line["shard"], line["offset"], line["key"]) == (str(at.path), at.offset, at.key)
        assert damage.DAMAGE[name][1] in line["reason"], name
        assert line["stand_in"] not in found and line["where"].startswith("rank 0, epoch ")
    member = f"{data.key(BAD['no image'])}.000.jpg"
    assert found[BAD["no image"]]["member"] == member
    for step in steps:
        for batch in step.batches:
            assert len(batch.frames) == max(1, int(batch.cu_frames[-1]))
            assert (batch.kind == "text") == (not batch.has_frames)


@pytest.mark.parametrize(("world_size", "threads"), [(2, 1), (4, 8), (8, 2)])
def test_ranks_and_threads_change_nothing(
    start: Callable[..., Loader], world_size: int, threads: int
) -> None:
    alone = content(take(start()))
    ranks = [
        content(take(start(threads=threads, rank=rank, world_size=world_size)))
        for rank in range(world_size)
    ]
    for number, step in enumerate(alone):
        together = [batch for rank in ranks for batch in rank[number]]
        assert sorted(together) == sorted(step)


@pytest.mark.parametrize("done", [1, 3, 6])
def test_a_resumed_run_is_identical_even_if_shards_were_mended(
    data: Catalog, start: Callable[..., Loader], tokenizer_path: Path, tmp_path: Path, done: int
) -> None:
    whole = take(start())
    at = whole[done - 1]
    rest = take(start(position=at.next, quarantine=at.quarantine), STEPS - done)
    assert content(rest) == content(whole[done:])
    assert [step.quarantine for step in rest] == [step.quarantine for step in whole[done:]]
    paths = helpers.write_shards(tmp_path / "shards", COUNTS, PER_SHARD)
    manifest.build(paths, str(tokenizer_path), IMAGE_TOKEN, tmp_path / "m.parquet")
    mended = catalog.load([("train", tmp_path / "m.parquet", 1)])
    found = take(start(mended, quarantine=whole[-1].quarantine))
    assert content(found) == content(whole)


def test_world_size_may_change_in_the_middle(start: Callable[..., Loader]) -> None:
    whole = take(start())
    parts, at = [], whole[0]
    for number, world_size in enumerate([8, 1, 4, 2]):
        quarantine = tuple(sorted(set(whole[number].quarantine)))
        ranks = [
            take(start(rank=r, world_size=world_size, position=at.next, quarantine=quarantine), 1)[
                0
            ]
            for r in range(world_size)
        ]
        parts.append(sorted(b for rank in ranks for b in content([rank])[0]))
        at = ranks[0]
    assert parts == [sorted(step) for step in content(whole)[1:5]]


def test_too_many_bad_samples_stop_the_run(start: Callable[..., Loader]) -> None:
    with pytest.raises(DataError, match=r"9 of \d+ samples are bad, more than data.max_bad_frac"):
        take(start(frac=0.01), 3 * STEPS)


def test_without_a_good_substitute_the_run_stops(start: Callable[..., Loader]) -> None:
    with pytest.raises(DataError, match="it is bad, and none of .* substitutes is good"):
        take(start(quarantine=range(len(COUNTS))), 1)


def test_nothing_of_a_shard_runs(
    data: Catalog,
    start: Callable[..., Loader],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same members run when `webdataset` decodes them: the plant is real."""
    monkeypatch.chdir(tmp_path)
    take(start(), 3 * STEPS)
    assert not damage.MARK.exists()
    at = damage.place(data, BAD["pickle"])
    alone = tmp_path / "alone.tar"
    with tarfile.open(alone, "w") as archive:
        for name, body in at.members():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    rival = webdataset.WebDataset(str(alone), shardshuffle=False, handler=webdataset.warn_and_stop)
    list(rival.decode(handler=webdataset.warn_and_stop))
    assert damage.MARK.exists()
