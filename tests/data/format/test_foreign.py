from typing import Any

import pytest

from vlm.data.format.foreign import parse_foreign
from vlm.data.format.schema import CAPTION_PROMPT, Preference, Sample, TokenPreference
from vlm.errors import SampleError


def parse(tree: dict[str, Any], kind: Any = "text", text: str | None = None) -> Sample:
    num_images = {"text": 0, "image": 1, "video": 4}[kind]
    return parse_foreign(tree, text, kind, num_images, "a.tar: 1.json")


def test_question_and_answer() -> None:
    sample = parse({"user": "Why?", "assistant": "So.", "source": "o", "frame_count": 4}, "video")
    assert [(t.role, t.content) for t in sample.conversation()] == [
        ("user", "Why?"),
        ("assistant", "So."),
    ]
    assert (sample.kind, sample.source, sample.frame_count) == ("video", "o", 4)


def test_a_pair_of_answers() -> None:
    tree = {"user": "Why?", "chosen_assistant": "So.", "rejected_assistant": "No."}
    pair = parse(tree, "image").preference
    assert isinstance(pair, Preference)
    assert [turn.content for turn in pair.prompt] == ["Why?"]
    assert (pair.chosen, pair.rejected) == ("So.", "No.")


def test_a_pair_of_tokens() -> None:
    tree = {
        "chosen_token_ids": [1, 2, 3],
        "chosen_loss_mask": [0, 1, 1],
        "rejected_token_ids": [1, 4],
        "rejected_loss_mask": [False, True],
        "token_ids": [9],
        "loss_mask": [1],
    }
    pair = parse(tree).preference
    assert isinstance(pair, TokenPreference)
    assert (pair.chosen.token_ids, pair.chosen.loss_mask) == ((1, 2, 3), (0, 1, 1))
    assert (pair.rejected.token_ids, pair.rejected.loss_mask) == ((1, 4), (0, 1))


def test_tokens_come_before_the_text_they_were_made_of() -> None:
    tree = {"token_ids": [1, 2], "loss_mask": [0, 1], "user": "x", "assistant": "y", "caption": "z"}
    assert parse(tree).form == "tokens"
    assert parse(tree | {"token_ids": None}).form == "turns"


def test_the_text_member_is_the_caption() -> None:
    assert parse({"caption": "from JSON"}, "image", "from text").caption == "from text"
    assert parse({"caption": None}, "image", "from text").caption == "from text"
    asked = parse({"caption": "from JSON"}, "image").conversation()
    assert [turn.content for turn in asked] == [CAPTION_PROMPT, "from JSON"]


@pytest.mark.parametrize(
    ("kind", "question", "expected"),
    [
        ("video", "<image>\nWhy?", "<video>\nWhy?"),
        ("video", "<video>\nWhy?", "<video>\nWhy?"),
        ("image", "<image>\nWhy?", "<image>\nWhy?"),
    ],
)
def test_an_image_mark_of_a_video_stands_for_all_frames(
    kind: str, question: str, expected: str
) -> None:
    sample = parse({"user": question, "assistant": "So."}, kind)
    assert sample.conversation()[0].content == expected


def test_only_what_identifies_a_sample_is_carried_along() -> None:
    tree = {
        "caption": "x",
        "url": "u",
        "license": "MIT",
        "id": 7,
        "exif": {"a": 1},
        "uid": "y" * 9999,
    }
    assert parse(tree, "image").meta == {"url": "u", "license": "MIT", "id": 7}


@pytest.mark.parametrize(
    ("tree", "fault"),
    [
        ({}, "nothing to learn"),
        ({"caption": "x", "frame_count": 5}, "frame_count is 5 but there are 4 images"),
        ({"caption": "x", "frame_count": float("nan")}, "frame_count"),
        ({"caption": 7}, "caption"),
        ({"caption": " "}, "caption is empty"),
        ({"user": "Why?"}, "content is empty"),
        ({"assistant": "So."}, "content is empty"),
        ({"user": "<image><image>", "assistant": "x"}, "0 <video> and 2 <image> marks"),
        ({"token_ids": [1, 2], "loss_mask": [1]}, "2 token_ids but a loss_mask of 1"),
        ({"token_ids": [1, 2]}, "loss_mask of 0"),
        ({"token_ids": [1, 2], "loss_mask": [0, 0]}, "no token to learn"),
        ({"token_ids": [1, -2], "loss_mask": [0, 1]}, "token_ids.1"),
        ({"token_ids": [1, 1 << 40], "loss_mask": [0, 1]}, "token_ids.1"),
        ({"token_ids": [1, 0.5], "loss_mask": [0, 1]}, "token_ids.1"),
        ({"token_ids": [1, 2], "loss_mask": [0, 3]}, "loss_mask.1"),
        ({"token_ids": [1, 2], "loss_mask": [0, float("nan")]}, "loss_mask.1"),
        ({"user": "x", "chosen_assistant": "y"}, "answer is empty"),
        ({"user": "x", "chosen_assistant": "y", "rejected_assistant": "y"}, "the same answer"),
    ],
)
def test_faults_are_named(tree: dict[str, Any], fault: str) -> None:
    with pytest.raises(SampleError, match=fault) as caught:
        parse(tree, "video")
    assert str(caught.value).startswith("a.tar: 1.json: ")
