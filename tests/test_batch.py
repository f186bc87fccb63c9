"""Flattening against a naive loop over samples."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from vlm.batch import Batch, build_batch, shift_labels
from vlm.errors import DataError

IMAGE = 9


def make(
    samples: list[tuple[int, list[int], list[int]]], per_frame: int = 1, **changes: Any
) -> Batch:
    """Of (frames, ids, labels)."""
    total = sum(count for count, _, _ in samples)
    values: dict[str, Any] = {
        "frames": torch.zeros(max(1, total), 3, 4, 4, dtype=torch.uint8),
        "frame_counts": [count for count, _, _ in samples],
        "input_ids": [ids for _, ids, _ in samples],
        "labels": [labels for _, _, labels in samples],
        "image_token_id": IMAGE,
        "tokens_per_frame": per_frame,
        "keys": [f"key{i}" for i in range(len(samples))],
        "kind": "video" if total else "text",
    }
    return build_batch(**(values | changes))


def draw(rng: random.Random, per_frame: int) -> tuple[int, list[int], list[int]]:
    """Placeholders anywhere, labels anywhere but on them."""
    count = rng.randrange(4)
    ids = [IMAGE] * (count * per_frame) + [rng.randrange(9) for _ in range(rng.randrange(1, 8))]
    rng.shuffle(ids)
    return count, ids, [i if i != IMAGE and rng.random() < 0.5 else -100 for i in ids]


@pytest.mark.parametrize("per_frame", [1, 3])
def test_it_equals_a_loop_over_samples(per_frame: int) -> None:
    rng = random.Random(per_frame)
    for _ in range(50):
        samples = [draw(rng, per_frame) for _ in range(rng.randrange(1, 6))]
        batch = make(samples, per_frame)
        ids: list[int] = []
        positions, placeholders, targets, target_index, prefixes = [], [], [], [], [1]
        starts, frames = [0], [0]
        for count, own, labels in samples:
            for place, (token, _) in enumerate(zip(own, labels, strict=True)):
                if token == IMAGE:
                    placeholders.append(len(ids))
                    prefixes.append(place + 1)
                if place + 1 < len(own) and labels[place + 1] != -100:
                    target_index.append(len(ids))
                    targets.append(labels[place + 1])
                ids.append(token)
                positions.append(place)
            starts.append(len(ids))
            frames.append(frames[-1] + count)
        assert batch.input_ids.tolist() == ids
        assert batch.labels.tolist() == [label for _, _, own in samples for label in own]
        assert batch.position_ids.tolist() == positions
        assert batch.cu_seqlens.tolist() == starts
        assert batch.cu_frames.tolist() == frames
        assert batch.frame_index.tolist() == placeholders
        assert batch.target_index.tolist() == target_index
        assert batch.targets.tolist() == targets
        assert batch.max_seqlen == max(len(own) for _, own, _ in samples)
        assert batch.max_prefix == max(prefixes)
        assert batch.num_loss_tokens == len(targets)
        assert batch.has_frames == bool(placeholders)
        assert batch.num_samples == len(samples)


def test_every_index_is_int64() -> None:
    batch = make([(1, [IMAGE, 2], [-100, 2]), (0, [3], [-100])])
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == (torch.uint8 if name == "frames" else torch.int64), name


def test_text_alone_carries_a_frame_that_nobody_owns() -> None:
    batch = make([(0, [1, 2, 3], [-100, 2, 3]), (0, [4], [-100])])
    assert len(batch.frames) == 1
    assert batch.cu_frames.tolist() == [0, 0, 0]
    assert batch.frame_index.numel() == 0 and not batch.has_frames
    assert batch.max_prefix == 1


@pytest.mark.parametrize("ids", [[IMAGE, 1], [IMAGE] * 3 + [1], [1]])
def test_placeholders_that_do_not_fit_the_frames_name_the_sample(ids: list[int]) -> None:
    good = (1, [IMAGE, 1], [-100, 1])
    with pytest.raises(DataError, match=rf"sample key1: found {ids.count(IMAGE)} placeholder.*2"):
        make([good, (2, ids, [-100] * len(ids))])


def test_placeholders_are_counted_in_each_sample_by_itself() -> None:
    """Two faults that cancel out in the sum."""
    with pytest.raises(DataError, match="sample key0"):
        make([(1, [1, 2], [-100] * 2), (1, [IMAGE, IMAGE], [-100] * 2)])


def test_frames_that_no_sample_owns_are_a_bug_of_ours() -> None:
    with pytest.raises(AssertionError):
        make([(1, [IMAGE, 1], [-100, 1])], frames=torch.zeros(2, 3, 4, 4, dtype=torch.uint8))


def test_shift_never_crosses_samples() -> None:
    labels = np.array([1, 2, 3, 4, 5])
    shifted = shift_labels(labels, np.array([0, 2, 5]))
    assert shifted.tolist() == [2, -100, 4, 5, -100]
    assert labels.tolist() == [1, 2, 3, 4, 5]


def test_moving_it_keeps_all_that_is_no_tensor() -> None:
    batch = make([(1, [IMAGE, 2], [-100, 2])])
    assert batch.to(torch.device("cpu")) is batch
    moved = batch.to(torch.device("meta"))
    assert moved.frames.device.type == moved.targets.device.type == "meta"
    assert moved.keys == batch.keys and moved.max_seqlen == batch.max_seqlen
