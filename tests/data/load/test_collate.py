"""Token ids and frames of a sample, against chat.encode by hand."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.data import helpers
from tests.data.collators import make_collator
from tests.data.conftest import IMAGE_TOKEN
from vlm.config import AugmentConfig
from vlm.data.format.schema import Turn
from vlm.data.load.collate import Collator, question_first
from vlm.data.text import chat


@pytest.fixture
def collator(tokenizer: PreTrainedTokenizerFast) -> Collator:
    return make_collator(tokenizer, seed=3, tokens_per_frame=2)


def test_frames_stand_before_the_text(collator: Collator) -> None:
    sample = helpers.make_sample(0, 3)
    plain = chat.encode(collator.tokenizer, sample.conversation(), IMAGE_TOKEN)
    encoded = collator.encode_sample(sample, 3)
    assert encoded.input_ids == [collator.image_token_id] * 6 + plain.input_ids
    assert encoded.labels == [-100] * 6 + plain.labels


@pytest.mark.parametrize("kind", ["video", "image"])
def test_or_behind_the_first_question(collator: Collator, kind: str) -> None:
    sample = helpers.make_sample(0, 3).model_copy(update={"kind": kind})
    plain, encoded = (collator.encode_sample(sample, 3, question_first=f) for f in (False, True))
    assert sorted(plain.input_ids) == sorted(encoded.input_ids), "as many tokens as planned"
    assert [i for i in plain.labels if i >= 0] == [i for i in encoded.labels if i >= 0]
    start = encoded.input_ids.index(collator.image_token_id)
    assert encoded.input_ids[start : start + 6] == [collator.image_token_id] * 6
    before = collator.tokenizer.decode(encoded.input_ids[:start])
    assert before.endswith("What colour is the circle?")


@pytest.mark.parametrize(
    ("kind", "num_frames", "mark"),
    [("video", 3, "<video>"), ("image", 3, "<image><image><image>"), ("video", 1, "<video>")],
)
def test_the_place_is_marked_as_of_its_kind(kind: str, num_frames: int, mark: str) -> None:
    said = (Turn(role="system", content="s"), Turn(role="user", content="What?"))
    system, asked = question_first(said, kind, num_frames)
    assert (system, asked.content) == (said[0], f"What?{mark}")
    assert question_first(said, "text", 0) == said


def test_a_text_that_says_where_keeps_it(collator: Collator) -> None:
    turns = (
        Turn(role="user", content="<video>What colour?"),
        Turn(role="assistant", content="red"),
    )
    sample = helpers.make_sample(0, 3).model_copy(update={"turns": turns})
    assert collator.encode_sample(sample, 3, question_first=True) == collator.encode_sample(
        sample, 3
    )


def test_an_answer_says_nothing_about_where(collator: Collator) -> None:
    """A mark is plain text there, as everywhere."""
    turns = (Turn(role="user", content="Which tag?"), Turn(role="assistant", content="<video>"))
    sample = helpers.make_sample(0, 3).model_copy(update={"turns": turns})
    ids = collator.encode_sample(sample, 3, question_first=True).input_ids
    assert ids[0] != collator.image_token_id and ids.count(collator.image_token_id) == 6


def test_repeated_images(collator: Collator) -> None:
    sample = helpers.make_sample(0, 2).model_copy(update={"kind": "image"})
    marked = sample.model_copy(
        update={
            "turns": (
                Turn(role="user", content="<image>a<image>b"),
                Turn(role="assistant", content="red"),
            )
        }
    )
    for one in (sample, marked):
        ids = collator.encode_sample(one, 2, repeats=4).input_ids
        assert ids.count(collator.image_token_id) == 2 * 4 * 2


def test_augmentation_is_in_place_and_drawn_for_the_row(collator: Collator) -> None:
    frames = np.stack(helpers.make_frames(0, 4))
    same = frames.copy()
    collator.augment_frames(same, 1, 0)
    assert np.array_equal(same, frames)
    shifting = dataclasses.replace(collator, augment=AugmentConfig(brightness=0.5))
    first, again, other = frames.copy(), frames.copy(), frames.copy()
    shifting.augment_frames(first, 1, 0)
    shifting.augment_frames(again, 1, 0)
    shifting.augment_frames(other, 2, 0)
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert not np.array_equal(first, frames)


def test_both_ways_to_a_batch_agree(collator: Collator) -> None:
    samples = [helpers.make_sample(i, n) for i, n in enumerate((2, 0, 3))]
    frames = [np.stack(helpers.make_frames(i, n)) if n else np.empty((0, 16, 16, 3), np.uint8)
              for i, n in enumerate((2, 0, 3))]  # fmt: skip
    encoded = [collator.encode_sample(s, len(f)) for s, f in zip(samples, frames, strict=True)]
    one = collator.batch(frames, encoded, ["a", "b", "c"], "video", (16, 16))
    slab = torch.from_numpy(np.concatenate([frames[0], frames[2]]))
    two = collator.join(slab, [2, 0, 3], encoded, ["a", "b", "c"], "video")
    assert torch.equal(one.frames, two.frames) and one.cu_frames.tolist() == [0, 2, 2, 5]
    assert torch.equal(one.input_ids, two.input_ids) and one.frames.shape == (5, 3, 16, 16)
