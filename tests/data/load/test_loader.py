"""Micro-batches of every rank against the plan, and against each other."""

import dataclasses
import gc
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.data import helpers
from tests.data.collators import make_collator
from tests.data.conftest import IMAGE_TOKEN
from tests.data.random_rows import make_policy
from tests.waiting import wait_for
from vlm.batch import Batch
from vlm.config import AugmentConfig, DataConfig
from vlm.data.load.collate import Collator, frame_size
from vlm.data.load.loader import MAX_PART, LoadedStep, Loader, cut
from vlm.data.load.reader import Opened, Reader
from vlm.data.manifest import manifest
from vlm.data.plan import catalog
from vlm.data.plan.catalog import Catalog
from vlm.data.plan.plan import Plan, Position, assign
from vlm.data.plan.planning import rows_from_catalog
from vlm.data.text import chat
from vlm.errors import DataError, TransientError

#: 60 clips and 24 texts in 5 shards
COUNTS = [(i * 5) % 8 + 1 for i in range(60)] + [0] * 24
NUM_STEPS = 12
AUGMENT = AugmentConfig(shift_px=2, contrast=0.1, brightness=0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Path:
    folder = tmp_path_factory.mktemp("loader")
    build(folder, tokenizer_path)
    return folder


def build(folder: Path, tokenizer_path: Path) -> None:
    paths = helpers.write_shards(folder / "shards", COUNTS, per_shard=18)
    manifest.build(paths, str(tokenizer_path), IMAGE_TOKEN, folder / "m.parquet")


@pytest.fixture(scope="module")
def data(folder: Path) -> Catalog:
    return catalog.load([("train", folder / "m.parquet", 1)])


@pytest.fixture
def no_threads_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.fixture
def collator(tokenizer: PreTrainedTokenizerFast) -> Collator:
    return make_collator(tokenizer, seed=7)


def make_plan(data: Catalog, **changes: Any) -> Plan:
    small = {"micro_batches": 4, "budget": 150, "frame_cost": 2, "text_frac": 0.25, "window": 30}
    policy = make_policy(seed=7, **{**small, **changes})
    return Plan(rows_from_catalog(data, "answers"), policy, ["fingerprint"])


def make_loader(
    data: Catalog,
    collator: Collator,
    *,
    rank: int = 0,
    world_size: int = 1,
    position: Position | None = None,
    threads: int = 2,
    prefetch: int = 4,
    **policy: Any,
) -> Loader:
    config = DataConfig(
        train="unused",
        eval="unused",
        micro_batches=4,
        budget=150,
        decode_threads=threads,
        prefetch=prefetch,
    )
    plan = make_plan(data, **policy)
    return Loader(data, plan, collator, config, rank=rank, world_size=world_size, position=position)


def take(loader: Loader, count: int = NUM_STEPS) -> list[LoadedStep]:
    with closing(iter(loader)) as steps:  # type: ignore[type-var]
        return list(itertools.islice(steps, count))


def content(batch: Batch) -> tuple[Any, ...]:
    """All of a batch, to be compared bit for bit."""
    return tuple(
        (value.shape, value.dtype, value.contiguous().numpy().tobytes())
        if isinstance(value, torch.Tensor)
        else value
        for value in (getattr(batch, field.name) for field in dataclasses.fields(batch))
    )


def pixels_by_key(steps: list[LoadedStep]) -> dict[tuple[int, str], bytes]:
    """Frames of each sample in each epoch."""
    found = {}
    for step in steps:
        for batch in step.batches:
            for index, key in enumerate(batch.keys):
                own = batch.frames[batch.cu_frames[index] : batch.cu_frames[index + 1]]
                found[step.epoch, key] = own.contiguous().numpy().tobytes()
    return found


@pytest.mark.parametrize("batching", ["bucketed", "packed"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_read_the_plan_and_each_its_share(
    data: Catalog, collator: Collator, world_size: int, batching: str
) -> None:
    plan = make_plan(data, batching=batching)
    expected = [planned.step for planned in itertools.islice(plan.steps(), NUM_STEPS)]
    ranks = [
        take(make_loader(data, collator, rank=rank, world_size=world_size, batching=batching))
        for rank in range(world_size)
    ]
    for number, step in enumerate(expected):
        loaded = [rank[number] for rank in ranks]
        shares = assign([micro.cost for micro in step], world_size)
        for share, own in zip(shares, loaded, strict=True):
            assert [b.keys for b in own.batches] == [data.keys(step[i].rows) for i in share]
            assert [b.kind for b in own.batches] == [step[i].kind for i in share]
            assert own.plan[0].rows.tolist() == step[0].rows.tolist()
        keys = sorted(key for own in loaded for batch in own.batches for key in batch.keys)
        assert keys == sorted(data.keys(np.concatenate([micro.rows for micro in step])))
        assert len({own.next for own in loaded}) == 1


def test_a_batch_holds_its_samples(
    data: Catalog, collator: Collator, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Against samples made anew, not read: pixels but for JPEG, tokens exactly."""
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    for step in take(make_loader(data, collator), 6):
        for batch in step.batches:
            for index, key in enumerate(batch.keys):
                row = int(key)
                turns = helpers.make_sample(row, COUNTS[row]).conversation()
                encoded = chat.encode(tokenizer, turns, IMAGE_TOKEN)
                own = slice(int(batch.cu_seqlens[index]), int(batch.cu_seqlens[index + 1]))
                assert batch.input_ids[own].tolist() == [image_id] * COUNTS[row] + encoded.input_ids
                assert batch.labels[own].tolist() == [-100] * COUNTS[row] + encoded.labels
                first, last = batch.cu_frames[index], batch.cu_frames[index + 1]
                assert last - first == COUNTS[row]
                if COUNTS[row]:
                    shown = batch.frames[first:last].permute(0, 2, 3, 1).numpy().astype(int)
                    written = np.stack(helpers.make_frames(row, COUNTS[row]))
                    assert abs(shown - written).mean() < 3


def test_threads_and_prefetch_change_nothing(data: Catalog, collator: Collator) -> None:
    collator = dataclasses.replace(collator, augment=AUGMENT)
    one = take(make_loader(data, collator, threads=1, prefetch=1))
    four = take(make_loader(data, collator, threads=4, prefetch=16))
    for a, b in zip(one, four, strict=True):
        assert [content(batch) for batch in a.batches] == [content(batch) for batch in b.batches]
        assert a.next == b.next and a.epoch == b.epoch


@pytest.mark.parametrize("batching", ["bucketed", "packed"])
def test_resuming_is_going_on(data: Catalog, collator: Collator, batching: str) -> None:
    collator = dataclasses.replace(collator, augment=AUGMENT)
    whole = take(make_loader(data, collator, batching=batching), 16)
    assert whole[0].epoch == 0 and whole[-1].epoch > 0 and len({s.next.window for s in whole}) > 2
    for done in range(1, 16, 3):
        rest = make_loader(data, collator, batching=batching, position=whole[done - 1].next)
        for resumed, expected in zip(take(rest, 16 - done), whole[done:], strict=True):
            assert resumed.next == expected.next and resumed.epoch == expected.epoch
            for a, b in zip(resumed.batches, expected.batches, strict=True):
                assert content(a) == content(b)


def test_augmentation_follows_sample_and_epoch_alone(data: Catalog, collator: Collator) -> None:
    augmented = dataclasses.replace(collator, augment=AUGMENT)
    alone = pixels_by_key(take(make_loader(data, augmented), 16))
    ranks: dict[tuple[int, str], bytes] = {}
    for rank in range(4):
        loader = make_loader(data, augmented, rank=rank, world_size=4, batching="packed")
        ranks |= pixels_by_key(take(loader, 16))
    both = alone.keys() & ranks.keys()
    assert len(both) > 60
    assert all(alone[name] == ranks[name] for name in both)
    plain = pixels_by_key(take(make_loader(data, collator), 16))
    clips = {key for _, key in both if COUNTS[int(key)]}
    assert sum(alone[0, key] != plain[0, key] for key in clips) > 0.9 * len(clips)
    twice = [key for key in clips if (1, key) in alone]
    assert len(twice) > 10
    assert sum(alone[0, key] != alone[1, key] for key in twice) > 0.9 * len(twice)
    other_seed = dataclasses.replace(augmented, seed=8)
    others = pixels_by_key(take(make_loader(data, other_seed), 4))
    assert any(others[name] != alone[name] for name in others)


def test_text_alone_carries_one_blank_frame(data: Catalog, collator: Collator) -> None:
    batches = [b for step in take(make_loader(data, collator)) for b in step.batches]
    texts = [batch for batch in batches if batch.kind == "text"]
    assert texts and len(texts) < len(batches)
    for batch in texts:
        assert batch.frames.shape == (1, 3, 16, 16) and not batch.frames.any()
        assert batch.cu_frames.tolist() == [0] * (len(batch.keys) + 1)
        assert not batch.has_frames
        assert collator.image_token_id not in batch.input_ids.tolist()
    for batch in batches:
        if batch.kind != "text":
            assert (
                len(batch.frames) == batch.cu_frames[-1] == sum(COUNTS[int(k)] for k in batch.keys)
            )


def test_a_frame_owns_as_many_placeholders_as_the_family_takes(
    data: Catalog, collator: Collator
) -> None:
    several = dataclasses.replace(collator, tokens_per_frame=3, loss_on="all")
    read = Reader(data).read
    loaded = [read(row) for row in (0, 3, 70)]
    encoded = [several.encode(one) for one in loaded]
    batch = several.batch(
        [one.frames for one in loaded], encoded, ["a", "b", "c"], "video", (16, 16)
    )
    assert len(batch.frame_index) == 3 * len(batch.frames) == 3 * (COUNTS[0] + COUNTS[3])
    is_frame = batch.input_ids == several.image_token_id
    assert (batch.labels[is_frame] == -100).all()
    assert torch.equal(batch.labels[~is_frame], batch.input_ids[~is_frame])


# --- what goes wrong --------------------------------------------------------------------------


@pytest.mark.usefixtures("no_threads_left")
def test_an_error_comes_out_at_its_own_step(
    data: Catalog, collator: Collator, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(data)
    steps = [planned.step for planned in itertools.islice(plan.steps(), 3)]
    row = int(steps[2][0].rows[0])
    assert all(row not in micro.rows for step in steps[:2] for micro in step)
    opened = Reader.open

    def failing(self: Reader, rows: Sequence[int]) -> list[Opened | None]:
        if row in rows:
            raise TransientError("the file system is gone")
        return opened(self, rows)

    monkeypatch.setattr(Reader, "open", failing)
    batches = iter(make_loader(data, collator, prefetch=64))
    for _ in range(2):
        next(batches)
    with pytest.raises(TransientError, match="the file system is gone"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.usefixtures("no_threads_left")
@pytest.mark.parametrize("prefetch", [1, 64])
def test_leaving_early_leaves_no_thread(data: Catalog, collator: Collator, prefetch: int) -> None:
    steps = iter(make_loader(data, collator, prefetch=prefetch))
    next(steps)
    steps.close()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("no_threads_left")
def test_a_forgotten_iterator_leaves_no_thread(data: Catalog, collator: Collator) -> None:
    for _ in make_loader(data, collator):
        break
    gc.collect()


def test_it_can_be_iterated_again(data: Catalog, collator: Collator) -> None:
    loader = make_loader(data, collator)
    first, again = take(loader, 2), take(loader, 2)
    assert content(first[1].batches[0]) == content(again[1].batches[0])


def test_it_reads_ahead_but_not_without_end(
    data: Catalog, collator: Collator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 micro-batches a step, 8 ahead: one step is taken, one ready, one joined, two are read."""
    read_rows: list[int] = []
    opened = Reader.open

    def counting(self: Reader, rows: Sequence[int]) -> list[Opened | None]:
        read_rows.extend(rows)
        return opened(self, rows)

    monkeypatch.setattr(Reader, "open", counting)
    plan = [planned.step for planned in itertools.islice(make_plan(data).steps(), 5)]
    expected = sum(len(micro.rows) for step in plan for micro in step)
    with closing(iter(make_loader(data, collator, prefetch=8))) as steps:  # type: ignore[type-var]
        next(steps)
        wait_for(lambda: len(read_rows) >= expected)
        time.sleep(0.1)  # for what is not to come
        assert len(read_rows) == expected


@pytest.mark.parametrize("threads", [1, 2, 3, 8, 50])
def test_parts_are_neighbours_of_about_one_size(threads: int) -> None:
    rng = np.random.default_rng(threads)
    for counts in ([5], [0] * 9, [64, 1, 1], rng.integers(0, 20, 40).tolist()):
        parts = list(cut(counts, threads))
        assert [i for first, last in parts for i in range(first, last)] == list(range(len(counts)))
        costs = [sum(max(1, count) for count in counts[first:last]) for first, last in parts]
        largest = max(1, *counts)
        assert max(costs) < min(MAX_PART, 2 * sum(costs) / threads + 1) + largest
        assert len(costs) == 1 or min(costs[:-1]) >= min(MAX_PART, 2 * sum(costs) / threads)


def test_frames_of_several_sizes_are_refused(data: Catalog, collator: Collator) -> None:
    assert frame_size(data) == (16, 16)
    width = data.width.copy()
    width[5] = 24
    mixed = dataclasses.replace(data, width=width)
    with pytest.raises(DataError, match="frames from 16 x 16 to 16 x 24 pixels, expected one size"):
        make_loader(mixed, collator)
    texts = dataclasses.replace(data, num_frames=np.zeros_like(data.num_frames))
    assert frame_size(texts) == (224, 224)
