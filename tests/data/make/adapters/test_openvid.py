from pathlib import Path

import pytest

from tests.data.make.adapters.clip_sets import collect, write, write_zip
from vlm.data.make.adapters import openvid
from vlm.errors import DataError

HEADER = "video,caption,aesthetic score,motion score,temporal consistency score,camera motion"
HEADER += ",frame,fps,seconds\n"
TAIL = ",4.6,2.1,0.99,static,241,29.97,8.0\n"


def test_clips_in_zips_and_unpacked(tmp_path: Path) -> None:
    rows = ['AbC-_1_13_0to241.mp4,"A cat, a dog."', "AbC-_1_14_5to9.mp4,Two.", "other.mp4,Three."]
    write(
        tmp_path / "data" / "train" / "OpenVid-1M.csv", HEADER + "".join(row + TAIL for row in rows)
    )
    write(tmp_path / "data" / "train" / "OpenVidHD.csv", HEADER + rows[0] + TAIL)
    write_zip(tmp_path / "OpenVid_part0.zip", {"OpenVid_part0/AbC-_1_13_0to241.mp4": b""})
    write(tmp_path / "video" / "AbC-_1_14_5to9.mp4", "")
    found, failures = collect(openvid.annotations, tmp_path)
    assert [(a.id, a.video, a.caption) for a in found] == [
        (
            "AbC-_1_13_0to241.mp4",
            "OpenVid_part0.zip!OpenVid_part0/AbC-_1_13_0to241.mp4",
            "A cat, a dog.",
        ),
        ("AbC-_1_14_5to9.mp4", "video/AbC-_1_14_5to9.mp4", "Two."),
    ]
    assert found[0].split_key == found[1].split_key == "AbC-_1"
    assert found[0].meta["motion score"] == "2.1"
    assert [f.reason for f in failures] == ["no such video"]
    assert "OpenVid-1M.csv, row 3: 'other.mp4'" in failures[0].error


def test_rows_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "OpenVid-1M.csv"
    path.write_bytes(b"video,caption\na.mp4,\na.mp4,x,y\na.mp4,\xff\n\nb\n")
    write(tmp_path / "a.mp4", "")
    found, failures = collect(openvid.annotations, tmp_path)
    assert not found
    assert [f.reason for f in failures] == [
        "bad record",
        "unreadable record",
        "unreadable record",
        "unreadable record",
    ]


def test_the_data_set_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="OpenVid"):
        collect(openvid.annotations, tmp_path)
