from pathlib import Path

import numpy as np

from tests.data import helpers
from tests.data.validation.edits import brief
from vlm.data.format import shards
from vlm.data.validation.check import Checks
from vlm.data.validation.report import Fault
from vlm.data.validation.validate import validate


def fresh(tmp_path: Path) -> tuple[Path, Path]:
    """Two shards of two folders, with the same keys and other content."""
    first = helpers.write_shards(tmp_path / "a", [1, 1, 1])[0]
    jpegs = [shards.encode_jpeg(helpers.make_frames(i, 1)[0]) for i in range(20, 23)]
    members = [
        member
        for i, jpeg in enumerate(jpegs)
        for member in (
            (f"{i:08d}.json", helpers.make_sample(i, 1).to_json()),
            (f"{i:08d}.000.jpg", jpeg),
        )
    ]
    (tmp_path / "b").mkdir()
    return first, helpers.write_tar(tmp_path / "b" / "video-00001.tar", members)


def test_keys_are_unique_in_a_folder(tmp_path: Path) -> None:
    first, second = fresh(tmp_path)
    assert validate([first, second]).faults == []
    beside = second.rename(first.with_name("video-00001.tar"))  # now of one data set
    assert validate([first, beside]).faults == [
        Fault(str(beside), f"{i:08d}", "", "key", f"the key is also in {first}") for i in range(3)
    ]


def test_odd_sizes_are_named_unless_frames_are_brought_to_one(tmp_path: Path) -> None:
    first, second = fresh(tmp_path)
    small = shards.encode_jpeg(np.zeros((8, 12, 3), np.uint8))
    members = helpers.tar_members(second)
    helpers.write_tar(second, [(n, small if n == "00000002.000.jpg" else b) for n, b in members])
    assert brief(validate([first, second])) == [
        ("video-00001.tar", "00000002", "", "size", "frames of 8x12, most have 16x16")
    ]
    assert validate([first, second], Checks(size=16)).faults == []
    assert validate([first, second]).total.as_json()["sizes"] == {"16x16": 5, "8x12": 1}


def test_the_same_content_twice_is_named_whatever_its_key_and_meta(tmp_path: Path) -> None:
    first, second = fresh(tmp_path)
    members = dict(helpers.tar_members(first))
    double = helpers.make_sample(1, 1).model_copy(update={"meta": {"id": "scraped again"}})
    asked = helpers.make_sample(2, 1)  # another answer: no double
    helpers.write_tar(
        second,
        [
            ("x.json", double.to_json()),
            ("x.000.jpg", members["00000001.000.jpg"]),
            ("y.json", asked.to_json()),
            ("y.000.jpg", members["00000001.000.jpg"]),
        ],
    )
    assert brief(validate([first, second])) == [
        (
            "video-00001.tar",
            "x",
            "",
            "content",
            f"the same content as key 00000001 in {first}",
        )
    ]
    allowed = validate([first, second], Checks(allowed=frozenset(["content"])))
    assert allowed.faults == [] and allowed.num_allowed == {"content": 1}
    assert allowed.num_faulty == 0
    one_shard = [*helpers.tar_members(second), ("z.json", double.to_json())]
    helpers.write_tar(second, [*one_shard, ("z.000.jpg", members["00000001.000.jpg"])])
    assert [f[1] for f in brief(validate([second]))] == ["z"]


def test_what_cannot_be_read_is_no_double(tmp_path: Path) -> None:
    path = helpers.write_tar(tmp_path / "a.tar", [("a.json", b"{}"), ("b.json", b"{}")])
    assert [f[3] for f in brief(validate([path]))] == ["schema", "schema"]
