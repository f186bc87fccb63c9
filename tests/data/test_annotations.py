import hashlib
import json
from pathlib import Path

import pytest

from vlm.data import annotations
from vlm.data.schema import MAX_JSON_BYTES
from vlm.errors import DataError

VIDEO = {"id": "a", "source": "s", "video": "clips/a.mp4", "caption": "A cat."}
TEXT = {
    "id": 7,
    "source": "s",
    "turns": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
    "meta": {"lang": "en"},
}


def write(path: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts))
    return path


def test_lines_are_found_and_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", VIDEO, "", TEXT, "  ", VIDEO | {"id": "b"})
    found = annotations.index(path)
    assert [line.number for line in found.video] == [0, 4]
    assert [line.number for line in found.text] == [2]
    assert found.failures == []
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    with path.open("rb") as file:
        assert [annotations.read(file, line).id for line in found.video[::-1]] == ["b", "a"]


def test_samples(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", VIDEO, TEXT)
    with path.open("rb") as file:
        video = annotations.read(file, annotations.Line(0, 0)).to_sample(3)
        text = annotations.read(file, annotations.index(path).text[0]).to_sample(0)
    assert (video.kind, video.frame_count, video.caption) == ("video", 3, "A cat.")
    assert (text.kind, text.frame_count) == ("text", 0)
    assert text.meta == {"lang": "en", "id": 7}
    assert text.turns is not None and text.turns[1].content == "A"


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "Invalid JSON"),
        ("[]", "object"),
        ({**VIDEO, "id": None}, "id"),
        ({k: v for k, v in VIDEO.items() if k != "source"}, "source"),
        ({**VIDEO, "video": "/etc/passwd"}, "root folder"),
        ({**VIDEO, "video": "a/../../b.mp4"}, "root folder"),
        ({**VIDEO, "video": ""}, "video"),
        ({**VIDEO, "turns": TEXT["turns"]}, "exactly one"),
        ({**VIDEO, "captions": "x"}, "captions"),
        ({**VIDEO, "caption": " "}, "empty"),
        ('{"id": "' + "x" * 2 * MAX_JSON_BYTES + '"}', "more than 4194304 bytes"),
    ],
)
def test_a_faulty_line_is_one_failure(tmp_path: Path, line: object, fault: str) -> None:
    found = annotations.index(write(tmp_path / "a.jsonl", TEXT, line, VIDEO))
    (failure,) = found.failures
    assert (failure.line, failure.reason) == (2, "bad annotation")
    assert fault in failure.error
    assert [line.number for line in found.video] == [2]


def test_files_that_are_no_annotations(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        annotations.index(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="is empty"):
        annotations.index(write(tmp_path / "a.jsonl", ""))
