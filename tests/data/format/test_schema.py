import json
from typing import Any

import pytest

from vlm.data.format.schema import MAX_JSON_BYTES, Sample, Turn, parse_sample
from vlm.errors import SampleError

QUESTION = {"role": "user", "content": "What colour?"}
ANSWER = {"role": "assistant", "content": "red", "task": "colour"}
TOKENS = {"token_ids": [4, 5, 6], "loss_mask": [0, 1, 1]}
PAIR = {"prompt": [QUESTION], "chosen": "red", "rejected": "green"}
VIDEO = {
    "version": 1,
    "kind": "video",
    "source": "quickstart",
    "frame_count": 8,
    "turns": [QUESTION, ANSWER],
}


def parse(**changes: Any) -> Sample:
    tree = {key: value for key, value in (VIDEO | changes).items() if value is not ...}
    return parse_sample(json.dumps(tree).encode(), "a.tar: 00000001.json")


def test_turns_are_read_as_written() -> None:
    sample = parse(meta={"any": {"thing": [1, None]}})
    assert sample.conversation() == [
        Turn(role="user", content="What colour?"),
        Turn(role="assistant", content="red", task="colour"),
    ]
    assert sample.meta == {"any": {"thing": [1, None]}}


def test_a_caption_becomes_a_question_and_its_answer() -> None:
    turns = parse(turns=..., caption="A red circle.").conversation()
    assert [(t.role, t.content) for t in turns] == [
        ("user", "Describe this."),
        ("assistant", "A red circle."),
    ]


def test_json_round_trip() -> None:
    for sample in (
        parse(meta={"null": None, "umlaut": "\u00e4"}),
        parse(turns=..., caption="x"),
        parse(kind="text", frame_count=0),
        parse(frame_count=...),
        parse(turns=..., tokens=TOKENS),
        parse(turns=..., preference=PAIR),
        parse(
            turns=..., preference={"chosen": TOKENS, "rejected": TOKENS | {"token_ids": [4] * 3}}
        ),
    ):
        assert parse_sample(sample.to_json(), "x") == sample


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"version": 2}, "version"),
        ({"version": ...}, "version"),
        ({"kind": "audio"}, "kind"),
        ({"frame_count": "8"}, "frame_count"),
        ({"frame_count": 65}, "frame_count"),
        ({"frame_count": -1}, "frame_count"),
        ({"frame_count": 0}, "needs 1 to 64 frames"),
        ({"frame_count": ..., "kind": "image"}, "only a video file has none"),
        ({"kind": "text"}, "needs 0 frames"),
        ({"source": ""}, "source"),
        ({"unknown": 1}, "unknown"),
        ({"turns": ...}, "exactly one"),
        ({"caption": "both"}, "exactly one"),
        ({"turns": ..., "caption": " "}, "caption is empty"),
        ({"turns": []}, "found none"),
        ({"turns": [QUESTION]}, "alternate"),
        ({"turns": [ANSWER, QUESTION]}, "alternate"),
        ({"turns": [QUESTION, ANSWER, ANSWER]}, "alternate"),
        ({"turns": [QUESTION, ANSWER, {"role": "system", "content": "x"}]}, "alternate"),
        ({"turns": [QUESTION, ANSWER | {"content": " \n"}]}, "turns.1.content"),
        ({"turns": [QUESTION, ANSWER | {"task": ""}]}, "turns.1.task"),
        ({"turns": [QUESTION, ANSWER | {"weight": 1}]}, "turns.1.weight"),
        ({"turns": [QUESTION | {"role": "human"}, ANSWER]}, "turns.0.role"),
        ({"meta": []}, "meta"),
        ({"tokens": TOKENS}, "exactly one of .*; found turns, tokens"),
        ({"turns": ..., "tokens": TOKENS | {"loss_mask": [1]}}, "3 token_ids but a loss_mask of 1"),
        ({"turns": ..., "tokens": TOKENS | {"loss_mask": [0, 0, 0]}}, "no token to learn"),
        ({"turns": ..., "tokens": TOKENS | {"loss_mask": [0, 0, 2]}}, "tokens.loss_mask.2"),
        ({"turns": ..., "tokens": TOKENS | {"token_ids": [0, -1, 2]}}, "tokens.token_ids.1"),
        ({"turns": ..., "tokens": TOKENS | {"tokenizer_sha256": "x"}}, "tokens.tokenizer_sha256"),
        ({"turns": ..., "preference": PAIR | {"rejected": " "}}, "answer is empty"),
        ({"turns": ..., "preference": PAIR | {"rejected": "red"}}, "the same answer"),
        ({"turns": ..., "preference": PAIR | {"prompt": [ANSWER]}}, "alternate"),
        ({"turns": ..., "preference": PAIR | {"prompt": []}}, "alternate"),
        ({"turns": ..., "preference": {"chosen": TOKENS, "rejected": TOKENS}}, "the same tokens"),
    ],
)
def test_faults_are_named(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(SampleError, match=fault) as caught:
        parse(**changes)
    assert str(caught.value).startswith("a.tar: 00000001.json: ")


def test_a_system_turn_may_come_first() -> None:
    turns = [{"role": "system", "content": "Be brief."}, QUESTION, ANSWER, QUESTION, ANSWER]
    assert len(parse(turns=turns).conversation()) == 5


@pytest.mark.parametrize("raw", [b"", b"[]", b"\xff\xfe", b'"x"', b"[" * 100_000, b'{"version": 1'])
def test_what_is_not_a_sample_is_one_error(raw: bytes) -> None:
    with pytest.raises(SampleError, match="^here: "):
        parse_sample(raw, "here")


def test_size_is_bounded() -> None:
    with pytest.raises(SampleError, match="bytes of JSON"):
        parse_sample(b" " * (MAX_JSON_BYTES + 1), "here")


@pytest.mark.parametrize(
    ("kind", "frame_count", "contents", "fits"),
    [
        ("video", 3, ["<video> What?"], True),
        ("video", None, ["What is in <video>?"], True),
        ("video", 3, ["<image><image>", "and <image>?"], True),
        ("image", 2, ["<image>", "<image>"], True),
        ("image", 2, ["What?"], True),
        ("image", 1, ["<video>"], False),
        ("video", 3, ["<video>", "<video>"], False),
        ("video", 3, ["<video><image>"], False),
        ("video", 3, ["<image>"], False),
        ("video", None, ["<image>"], False),
        ("image", 2, ["<image>"], False),
        ("image", 2, ["<image><image>", "<image>"], False),
        ("text", 0, ["<image>"], False),
        ("text", 0, ["<video>"], False),
    ],
)
def test_places_for_frames(
    kind: str, frame_count: int | None, contents: list[str], fits: bool
) -> None:
    turns = []
    for content in contents:
        turns += [{"role": "user", "content": content}, ANSWER | {"content": "<image> <video>"}]
    if fits:
        assert parse(kind=kind, frame_count=frame_count, turns=turns).kind == kind
        return
    with pytest.raises(SampleError, match="marks in the text"):
        parse(kind=kind, frame_count=frame_count, turns=turns)
    if len(contents) == 1:
        pair = {"prompt": turns[:1], "chosen": "a", "rejected": "b"}
        with pytest.raises(SampleError, match="marks in the text"):
            parse(kind=kind, frame_count=frame_count, turns=..., preference=pair)


def test_what_is_known_as_text() -> None:
    pair = parse(turns=..., preference=PAIR)
    assert [turn.content for turn in pair.conversation()] == ["What colour?", "red"]
    assert parse(turns=..., tokens=TOKENS).conversation() == []
    forms = [
        parse(**({"turns": ...} if words else {}), **words).form
        for words in ({}, {"caption": "x"}, {"tokens": TOKENS}, {"preference": PAIR})
    ]
    assert forms == ["turns", "caption", "tokens", "preference"]
