import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.make.adapters.clip_sets import collect, write, write_json_lines, write_zip
from vlm.data.make.adapters import vript
from vlm.errors import DataError


def scene(video: str, number: int) -> dict[str, Any]:
    return {
        "video_id": video,
        "clip_id": f"{video}-Scene-{number:03d}",
        "caption": {"shot_type": "close-up", "content": f"What {number} shows."},
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_zip(
        tmp_path / "vript_long_videos_clips" / "clips_1_of_1095.zip",
        {"a-b/a-b-Scene-001.mp4": b"", "a-b/a-b_cut_meta.json": b"{}"},
    )
    write(tmp_path / "vript_short_videos_clips" / "x" / "a-b-Scene-002.mp4", "")
    return tmp_path


def check(root: Path) -> None:
    found, failures = collect(vript.annotations, root)
    assert [(a.id, a.video, a.caption, a.split_key) for a in found] == [
        (
            "a-b-Scene-001",
            "vript_long_videos_clips/clips_1_of_1095.zip!a-b/a-b-Scene-001.mp4",
            "What 1 shows.",
            "a-b",
        ),
        (
            "a-b-Scene-002",
            "vript_short_videos_clips/x/a-b-Scene-002.mp4",
            "What 2 shows.",
            "a-b",
        ),
    ]
    assert found[0].meta == {"shot_type": "close-up"}
    assert [f.reason for f in failures] == ["no such video"]


def test_json_lines(root: Path) -> None:
    scenes = [scene("a-b", i) for i in (1, 2, 3)]
    write_json_lines(root / "vript_captions" / "vript_long_videos_captions.jsonl", *scenes)
    check(root)


@pytest.mark.parametrize("packed", [True, False])
def test_one_json_a_video(root: Path, packed: bool) -> None:
    data = {(s := scene("a-b", i))["clip_id"]: s for i in (1, 2, 3)}
    text = json.dumps({"meta": {"video_id": "a-b"}, "data": data})
    folder = root / "vript_captions"
    if packed:
        members = {"x/a-b_caption.json": text.encode()}
        write_zip(folder / "vript_long_videos_captions.zip", members)
    else:
        write(folder / "long" / "a-b_caption.json", text)
    check(root)


def test_scripts_that_are_none(root: Path) -> None:
    good = scene("a-b", 1)
    faulty = [{}, good | {"caption": "text"}, good | {"caption": {"content": 5}}]
    write_json_lines(root / "vript_captions" / "x_captions.jsonl", *faulty)
    for i, text in enumerate(("[]", "{", '{"data": {"a-b-Scene-001": 7}}')):
        write(root / "vript_captions" / f"{i}_caption.json", text)
    found, failures = collect(vript.annotations, root)
    assert not found
    assert [f.reason for f in failures] == [
        "unreadable record",
        "unreadable record",
        "bad record",
        "bad record",
        "bad record",
        "bad record",
    ]


def test_names_and_scripts_that_are_no_text(root: Path) -> None:
    folder = root / "vript_captions"
    odd = scene("a-b", 1) | {"caption": {"content": "x", "shot_type": "\ud800"}}
    data = {"a-b-Scene-001": odd, "\udcff": {"caption": {"content": "x"}}}
    write(folder / "1_caption.json", json.dumps({"data": data}))
    write_zip(folder / "a_captions.zip", {"x_caption.json": b"{}" * 50})
    path = folder / "a_captions.zip"
    path.write_bytes(path.read_bytes().replace(b"{}{}", b"{{{{", 1))  # its checksum is another
    found, failures = collect(vript.annotations, root)
    assert not found and len(failures) == 3
    assert all(failure.model_dump_json().isprintable() for failure in failures)


def test_the_data_set_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="vript_captions"):
        collect(vript.annotations, tmp_path)
