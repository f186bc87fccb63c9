import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from vlm.data.make import annotations
from vlm.data.make.annotations import Annotation
from vlm.errors import DataError

TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
VIDEO = {"id": "a", "source": "s", "video": "clips/a.mp4", "caption": "A cat."}
TEXT = {"id": 7, "source": "s", "turns": TURNS, "meta": {"lang": "en"}}
TWO = [{"role": "user", "content": "<image> or <image>?"}, TURNS[1]]
IMAGES = {"id": 8, "source": "s", "images": ["x.tar!a.jpg", "p.parquet!0/image"], "turns": TWO}


def parse(fields: dict[str, Any]) -> Annotation:
    return Annotation.model_validate_json(json.dumps(fields))


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_lines_are_found_and_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", VIDEO, IMAGES, TEXT, VIDEO | {"id": "b"}, TEXT | {"id": 9})
    found = annotations.index(path)
    assert {kind: lines.numbers.tolist() for kind, lines in found.items()} == {
        "video": [0, 3],
        "image": [1],
        "text": [2, 4],
    }
    with path.open("rb") as file:
        texts = list(annotations.read(file, found["text"]))
        (last,) = annotations.read(file, found["video"].chunks(1)[1])
    assert [(number, text.id) for number, text in texts] == [(2, 7), (4, 9)]
    assert (last[0], last[1].id) == (3, "b")


def test_chunks_share_all_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *[TEXT | {"id": i} for i in range(7)])
    chunks = annotations.index(path)["text"].chunks(3)
    assert [chunk.numbers.tolist() for chunk in chunks] == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize("line", ['{"id": "bad"}', "{"])
def test_a_file_that_was_changed(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(TEXT) + "\n" + line + "\n")
    with pytest.raises(DataError, match="a.jsonl, line 2.*delete the output"):
        found = annotations.index(path)
        with path.open("rb") as file:
            list(annotations.read(file, found["text"]))


def test_samples() -> None:
    video = parse(VIDEO | {"licence": "MIT"}).to_sample(3)
    assert (video.kind, video.frame_count, video.caption) == ("video", 3, "A cat.")
    assert video.meta == {"id": "a", "licence": "MIT"}
    text = parse(TEXT).to_sample(0)
    assert (text.kind, text.frame_count) == ("text", 0)
    assert text.meta == {"lang": "en", "id": 7}
    assert text.turns is not None and text.turns[1].content == "A"
    assert parse(IMAGES).to_sample(2).kind == "image"


def test_tokens_and_preferences_reach_the_sample() -> None:
    tokens = {"token_ids": [5, 6], "loss_mask": [0, 1]}
    found = parse({"id": 0, "source": "s", "tokens": tokens}).to_sample(0)
    assert found.tokens is not None and found.tokens.token_ids == (5, 6)
    pair = {"prompt": TURNS[:1], "chosen": "yes", "rejected": "no"}
    found = parse({"id": 0, "source": "s", "images": ["a.jpg"], "preference": pair}).to_sample(1)
    assert found.preference is not None and found.preference.rejected == "no"


def test_what_samples_are_split_by() -> None:
    assert parse(VIDEO).split_identity == "clips/a.mp4"
    assert parse(VIDEO | {"split_key": "a"}).split_identity == "a"
    assert parse(IMAGES).split_identity == "x.tar!a.jpg"
    assert parse(TEXT).split_identity == "7"


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({**VIDEO, "id": None}, "id"),
        ({k: v for k, v in VIDEO.items() if k != "source"}, "source"),
        ({**VIDEO, "video": "/etc/passwd"}, "root folder"),
        ({**VIDEO, "video": "a/../../b.mp4"}, "root folder"),
        ({**IMAGES, "images": ["a.jpg", "../b.zip!c.jpg"]}, "root folder"),
        ({**VIDEO, "video": ""}, "video"),
        ({**VIDEO, "images": ["a.jpg"]}, "not both"),
        ({**IMAGES, "images": ["a.jpg"]}, "<image>"),
        ({**VIDEO, "turns": TURNS}, "exactly one"),
        ({**VIDEO, "captions": "x"}, "captions"),
        ({**VIDEO, "caption": " "}, "empty"),
    ],
)
def test_faulty_annotations(fields: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        parse(fields)
