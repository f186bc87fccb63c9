import json
from pathlib import Path

import pytest

from tests.data import helpers
from tests.data.validation.edits import edited
from vlm.data.validation.quarantine import quarantine
from vlm.data.validation.validate import validate
from vlm.errors import DataError


def test_clean_copies_hold_the_good_samples_byte_for_byte(tmp_path: Path) -> None:
    paths = helpers.write_shards(tmp_path / "in", [2, 1, 3, 0, 1, 5], per_shard=2)
    edited(paths[0], {"00000000.json": b"{"})
    edited(paths[1], {"00000002.001.jpg": b"x", "00000003.json": b"[]"})
    members = {name: body for path in paths for name, body in helpers.tar_members(path)}
    report = validate(paths)
    done: list[tuple[int, int]] = []
    summary = quarantine(
        paths, report, tmp_path / "out", progress=lambda *counts: done.append(counts)
    )
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert (summary.num_samples, summary.num_left_out, summary.num_shards) == (3, 3, 2)
    clean = sorted((tmp_path / "out").glob("*.tar"))
    assert [path.name for path in clean] == ["video-00000.tar", "video-00002.tar"]
    expected = [(n, b) for n, b in members.items() if n[:8] in ("00000001", "00000004", "00000005")]
    assert [member for path in clean for member in helpers.tar_members(path)] == expected
    assert validate(clean).faults == []
    lines = (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["00000000", "00000002", "00000003"]
    assert [json.loads(line) for line in lines] == [fault._asdict() for fault in report.faults]


def test_what_is_left_of_a_damaged_shard_is_saved(tmp_path: Path) -> None:
    (path,) = helpers.write_shards(tmp_path / "in", [1, 1, 1, 1])
    data = bytearray(path.read_bytes())
    data[data.index(b"00000001.000.jpg")] ^= 1
    path.write_bytes(data[: data.index(b"00000003.000.jpg") + 600])
    quarantine([path], validate([path]), tmp_path / "out")
    clean = tmp_path / "out" / path.name
    assert validate([clean]).faults == []
    assert {name[:8] for name, _ in helpers.tar_members(clean)} == {"00000000", "00000002"}


def test_folders_keep_their_place_and_doubles_keep_the_first(tmp_path: Path) -> None:
    paths = [helpers.write_shards(tmp_path / "in" / name, [1, 1])[0] for name in "ab"]
    report = validate(paths)
    assert {fault.check for fault in report.faults} == {"content"}
    assert quarantine(paths, report, tmp_path / "out").num_samples == 2
    found = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.tar")]
    assert found == [Path("a/video-00000.tar")]


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    paths = helpers.write_shards(tmp_path / "in", [1])
    with pytest.raises(DataError, match="is not empty"):
        quarantine(paths, validate(paths), tmp_path / "in")
