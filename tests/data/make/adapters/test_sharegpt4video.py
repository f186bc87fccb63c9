from pathlib import Path

import pytest

from tests.data.make.adapters.clip_sets import collect, write_json_lines, write_zip
from vlm.data.make.adapters import sharegpt4video
from vlm.errors import DataError

PARTS = [{"idx": "0", "content": "Part."}, {"idx": "-1", "content": "Whole."}]


def record(name: str, captions: object = PARTS) -> dict[str, object]:
    path = f"panda/{name}.mp4"
    folder = "panda_videos_1.zip"
    return {"video_id": name, "video_path": path, "zip_folder": folder, "captions": captions}


def test_the_caption_of_the_whole_video(tmp_path: Path) -> None:
    write_zip(
        tmp_path / "zip_folder" / "panda" / "panda_videos_1.zip", {"a.mp4": b"", "b.mp4": b""}
    )
    write_json_lines(
        tmp_path / "sharegpt4video_40k.jsonl",
        record("a"),
        record("b", [{"idx": -1, "content": "Also whole."}]),
        record("c"),
        record("a", PARTS[:1]),
        record("a", "text"),
        {"video_id": "a"},
    )
    found, failures = collect(sharegpt4video.annotations, tmp_path)
    assert [(a.id, a.video, a.caption) for a in found] == [
        ("a", "zip_folder/panda/panda_videos_1.zip!a.mp4", "Whole."),
        ("b", "zip_folder/panda/panda_videos_1.zip!b.mp4", "Also whole."),
    ]
    assert [f.reason for f in failures] == ["no such video", *["bad record"] * 3]
    assert "line 4: no caption with `idx` -1" in failures[1].error


def test_the_data_set_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sharegpt4video_40k.jsonl"):
        collect(sharegpt4video.annotations, tmp_path)
