import json
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.data.conftest import IMAGE_TOKEN
from vlm.batch import build_batch
from vlm.data.format.schema import Sample
from vlm.data.text import chat, encode
from vlm.errors import SampleError

PREFIX = "<|user|>What?<|end|><|assistant|>"


def sample(frame_count: int | None = 0, kind: str = "", **words: Any) -> Sample:
    kind = kind or ("text" if frame_count == 0 else "video")
    tree = {"version": 1, "kind": kind, "source": "s", "frame_count": frame_count, **words}
    return Sample.model_validate_json(json.dumps(tree))


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def tokens(found: list[int], mask: list[int], **other: str) -> dict[str, Any]:
    return {"token_ids": found, "loss_mask": mask, **other}


def test_text_is_encoded_as_its_conversation(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "red"}]
    for words in ({"turns": turns}, {"caption": "red"}):
        one = sample(**words) if "turns" in words else sample(2, **words)
        for loss_on in ("answers", "all"):
            found = encode.encode_sample(tokenizer, one, IMAGE_TOKEN, loss_on)
            assert found == chat.encode(tokenizer, one.conversation(), IMAGE_TOKEN, loss_on)


def test_tokens_stay_as_they_are(tokenizer: PreTrainedTokenizerFast) -> None:
    text = ids(tokenizer, PREFIX + "red<|end|>")
    answer = len(text) - len(ids(tokenizer, PREFIX))
    mask = [0] * (len(text) - answer) + [1] * answer
    one = sample(tokens=tokens(text, mask))
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "red"}]
    assert encode.encode_sample(tokenizer, one, IMAGE_TOKEN) == encode.encode_sample(
        tokenizer, sample(turns=turns), IMAGE_TOKEN
    )
    assert encode.encode_sample(tokenizer, one, IMAGE_TOKEN, "all").labels == text


@pytest.mark.parametrize(
    ("kind", "frame_count", "num_marks", "expected"),
    [("video", 3, 1, 3), ("video", None, 1, 3), ("image", 3, 3, 3), ("image", 1, 1, 1)],
)
def test_image_tokens_are_places_of_frames(
    tokenizer: PreTrainedTokenizerFast,
    kind: str,
    frame_count: int | None,
    num_marks: int,
    expected: int,
) -> None:
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    found = [25, *[image_id] * num_marks, 26]
    one = sample(frame_count, kind, tokens=tokens(found, [1] * len(found)))
    encoded = encode.encode_sample(tokenizer, one, IMAGE_TOKEN)
    expanded = chat.expand_frames(encoded, expected, 2, image_id)
    assert expanded.input_ids == [25, *[image_id] * (2 * expected), 26]
    assert expanded.labels == [25, *[-100] * (2 * expected), 26]


def test_without_image_tokens_frames_stand_first(tokenizer: PreTrainedTokenizerFast) -> None:
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    encoded = encode.encode_sample(tokenizer, sample(2, tokens=tokens([25], [1])), IMAGE_TOKEN)
    assert chat.expand_frames(encoded, 2, 1, image_id).input_ids == [image_id, image_id, 25]


@pytest.mark.parametrize(
    ("kind", "frame_count", "num_marks"),
    [("video", 3, 2), ("image", 3, 1), ("text", 0, 1), ("video", None, 2)],
)
def test_image_tokens_must_fit_the_frames(
    tokenizer: PreTrainedTokenizerFast, kind: str, frame_count: int | None, num_marks: int
) -> None:
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    one = sample(
        frame_count, kind, tokens=tokens([image_id] * num_marks + [25], [1] * num_marks + [1])
    )
    with pytest.raises(SampleError, match=f"{num_marks} image tokens"):
        encode.encode_sample(tokenizer, one, IMAGE_TOKEN)


def test_tokens_of_another_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    own = chat.fingerprint(tokenizer)
    fits = sample(tokens=tokens([25], [1], tokenizer_sha256=own))
    assert encode.encode_sample(tokenizer, fits, IMAGE_TOKEN).input_ids == [25]
    other = sample(tokens=tokens([25], [1], tokenizer_sha256="0" * 64))
    with pytest.raises(SampleError, match="tokens of another tokenizer"):
        encode.encode_sample(tokenizer, other, IMAGE_TOKEN)
    large = sample(tokens=tokens([len(tokenizer)], [1]))
    with pytest.raises(SampleError, match=f"token {len(tokenizer)}, but tokenizer"):
        encode.encode_sample(tokenizer, large, IMAGE_TOKEN)


def test_a_pair_learns_only_the_answers_that_differ(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = [
        {"role": "user", "content": "<video> What?"},
        {"role": "assistant", "content": "green"},
        {"role": "user", "content": "Sure?"},
    ]
    pair = sample(2, preference={"prompt": prompt, "chosen": "red", "rejected": "a red circle"})
    branches = encode.encode_branches(tokenizer, pair, IMAGE_TOKEN, "all")
    for branch, answer in zip(branches, ("red", "a red circle"), strict=True):
        learned = [label for label in branch.labels if label != -100]
        assert learned == ids(tokenizer, f"{answer}<|end|>")
        assert branch.mark == "video"
    with pytest.raises(SampleError, match="a preference pair"):
        encode.encode_sample(tokenizer, pair, IMAGE_TOKEN)


def test_both_branches_make_a_batch(tokenizer: PreTrainedTokenizerFast) -> None:
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    pair = sample(
        2,
        preference={
            "chosen": tokens([25, 26, 27], [0, 1, 1]),
            "rejected": tokens([25, 28], [0, 1]),
        },
    )
    branches = [
        chat.expand_frames(branch, 2, 1, image_id)
        for branch in encode.encode_branches(tokenizer, pair, IMAGE_TOKEN)
    ]
    batch = build_batch(
        frames=torch.zeros(4, 3, 8, 8, dtype=torch.uint8),
        frame_counts=[2, 2],
        input_ids=[branch.input_ids for branch in branches],
        labels=[branch.labels for branch in branches],
        image_token_id=image_id,
        tokens_per_frame=1,
        keys=["a", "a"],
        kind="video",
    )
    assert batch.input_ids.tolist() == [image_id, image_id, 25, 26, 27, image_id, image_id, 25, 28]
    assert batch.targets.tolist() == [26, 27, 28]
