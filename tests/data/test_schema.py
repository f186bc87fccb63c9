import json
from typing import Any

import pytest

from vlm.data.schema import MAX_JSON_BYTES, Sample, Turn, parse_sample
from vlm.errors import SampleError

QUESTION = {"role": "user", "content": "What colour?"}
ANSWER = {"role": "assistant", "content": "red", "task": "colour"}
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
