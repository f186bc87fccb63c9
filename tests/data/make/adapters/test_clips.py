from pathlib import Path

import pytest

from tests.data.make.adapters.clip_sets import write, write_tar, write_zip
from vlm.data.make.adapters.clips import Clips
from vlm.errors import DataError


def test_clips_are_found_wherever_they_lie(tmp_path: Path) -> None:
    write(tmp_path / "videos" / "a.b.mp4", "")
    write_zip(tmp_path / "z" / "part1.zip", {"part1/c.MP4": b"", "part1/c.json": b"", "d.mkv": b""})
    write_tar(tmp_path / "x.tar", {"./e.webm": b""})
    clips = Clips(tmp_path)
    assert clips.find("a.b.mp4") == "videos/a.b.mp4"
    assert clips.find("a.b") == "videos/a.b.mp4"
    assert clips.find("anything/c.mp4") == "z/part1.zip!part1/c.MP4"
    assert clips.find("d.mp4") == "z/part1.zip!d.mkv"
    assert clips.find("e") == "x.tar!e.webm"
    assert clips.find("a.mp4") is None
    assert clips.find("") is None


def test_of_equal_names_the_one_whose_folders_agree(tmp_path: Path) -> None:
    for name in ("one/videos/1.mp4", "two/videos/1.mp4", "three/1.mp4"):
        write(tmp_path / name, "")
    clips = Clips(tmp_path)
    assert clips.find("two/videos/1.mp4") == "two/videos/1.mp4"
    assert clips.find("./x/three/1.mp4") == "three/1.mp4"
    assert clips.find("x/one/videos/1.mp4") == "one/videos/1.mp4"
    assert clips.find("1.mp4") == "one/videos/1.mp4"


def test_no_video_at_all(tmp_path: Path) -> None:
    write(tmp_path / "a.tar.gz", "")
    with pytest.raises(DataError, match="holds no video.*unpacked"):
        Clips(tmp_path)


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.zip", "no zip")
    with pytest.raises(DataError, match="a.zip.*download it again"):
        Clips(tmp_path)
