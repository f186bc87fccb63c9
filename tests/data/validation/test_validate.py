import shutil
from pathlib import Path

import pytest

from tests.data import helpers
from tests.data.conftest import IMAGE_TOKEN
from tests.data.validation.edits import brief, edited
from vlm.data.manifest import manifest
from vlm.data.validation.check import Checks
from vlm.data.validation.report import Fault
from vlm.data.validation.validate import validate
from vlm.errors import ConfigError, DataError

COUNTS = [2, 0, 5, 64, 1, 9]


def test_good_shards_are_clean(tmp_path: Path) -> None:
    paths = helpers.write_shards(tmp_path, COUNTS, per_shard=4)
    done: list[tuple[int, int]] = []
    report = validate(paths, progress=lambda *counts: done.append(counts))
    assert report.faults == []
    assert (report.num_shards, report.num_samples, report.num_decoded) == (2, 6, 6)
    assert report.num_bytes == sum(path.stat().st_size for path in paths)
    assert report.total.num_frames == sum(COUNTS)
    assert report.as_json()["total"]["kinds"] == {"text": 1, "video": 5}
    assert report.as_json()["total"]["sizes"] == {"16x16": 5}
    assert done == [(1, 2), (2, 2)]


def test_processes_find_the_same(tmp_path: Path) -> None:
    paths = helpers.write_shards(tmp_path, COUNTS, per_shard=2)
    edited(paths[1], {"00000002.000.jpg": b"x"})
    one, two = (validate(paths, workers=workers) for workers in (1, 2))
    assert one.as_json() == two.as_json()
    assert [fault.key for fault in one.faults] == ["00000002"]


def test_damaged_and_empty_shards_do_not_hide_others(tmp_path: Path) -> None:
    paths = helpers.write_shards(tmp_path, COUNTS, per_shard=2)
    data = paths[0].read_bytes()
    paths[0].write_bytes(data[: len(data) // 2 // 512 * 512])
    helpers.write_tar(paths[1], [])
    report = validate(paths)
    faults = [fault for fault in brief(report) if fault[3] == "tar"]
    assert [f[0] for f in faults] == ["video-00000.tar", "video-00001.tar"]
    assert "truncated" in faults[0][4]
    assert faults[1][4] == "holds no sample"
    assert "video-00002.tar" not in {f[0] for f in brief(report)}


def test_against_the_manifest(tokenizer_path: Path, tmp_path: Path) -> None:
    paths = helpers.write_shards(tmp_path / "s", [1] * 8, per_shard=2)
    output = tmp_path / "m.parquet"
    manifest.build(paths[:3], str(tokenizer_path), IMAGE_TOKEN, output)
    assert validate(paths[:3], manifest_path=output).faults == []
    data = paths[1].read_bytes()
    # a byte of padding: every member is as it was
    paths[1].write_bytes(data[:600] + b"x" + data[601:])
    shutil.copy(paths[3], paths[2])
    found = validate(paths, manifest_path=output).faults
    stated = {(f.shard, f.fault.partition(" ")[0]) for f in found if f.check == "manifest"}
    assert stated == {(str(paths[1]), "its"), (str(paths[2]), "its"), (str(paths[3]), "not")}
    paths[0].unlink()
    absent = validate(paths[1:2], manifest_path=output).faults[-2:]
    assert absent == [
        Fault(str(paths[0]), "", "", "manifest", "missing"),
        Fault(str(paths[2]), "", "", "manifest", "in the manifest, but not among the paths"),
    ]
    with pytest.raises(DataError, match="build_manifest"):
        validate(paths[1:2], manifest_path=paths[1])


@pytest.mark.parametrize("kind", ["folder", "tar", "manifest"])
def test_leaks_into_the_evaluation_set(tokenizer_path: Path, tmp_path: Path, kind: str) -> None:
    train = helpers.write_shards(tmp_path / "train", [1, 2, 3, 1], per_shard=2)
    held_out = helpers.write_shards(tmp_path / "eval", [0, 1, 2, 4], per_shard=4)[0]
    members = dict(helpers.tar_members(train[1]))
    # the frames of train's sample 2 under another key and with another question
    sample = helpers.make_sample(9, 3).model_copy(update={"source": "other"})
    leaked = [(f"00000009.{i:03d}.jpg", members[f"00000002.{i:03d}.jpg"]) for i in range(3)]
    members = [*helpers.tar_members(held_out), ("00000009.json", sample.to_json()), *leaked]
    helpers.write_tar(held_out, members)
    against = {"folder": held_out.parent, "tar": held_out, "manifest": tmp_path / "m.parquet"}[kind]
    if kind == "manifest":
        manifest.build([held_out], str(tokenizer_path), IMAGE_TOKEN, against)
    assert validate(train).faults == []
    report = validate(train, against=against)
    leaks = [f for f in report.faults if f.check == "leak"]
    # frames are a function of index and count: sample 1 of both has others
    assert [(Path(f.shard).name, f.key) for f in leaks] == [("video-00001.tar", "00000002")]
    assert f"key 00000009 of {held_out}" in leaks[0].fault
    assert report.num_samples == 4, "the evaluation set is not counted"


def test_text_leaks_by_its_words(tmp_path: Path) -> None:
    sample = helpers.make_sample(0, 0)
    other = sample.model_copy(update={"meta": {"id": "else"}, "source": "else"})
    train = helpers.write_tar(tmp_path / "t.tar", [("a.json", sample.to_json())])
    held_out = helpers.write_tar(tmp_path / "e.tar", [("b.json", other.to_json())])
    assert [f.check for f in validate([train], against=held_out).faults] == ["leak"]


def test_a_damaged_evaluation_set_is_a_mistake(tmp_path: Path) -> None:
    (train,) = helpers.write_shards(tmp_path / "t", [1])
    (held_out,) = helpers.write_shards(tmp_path / "e", [1])
    held_out.write_bytes(held_out.read_bytes()[:1024])
    with pytest.raises(DataError, match="what leaked cannot be told"):
        validate([train], against=held_out)


def test_a_limit_without_a_tokenizer_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name one"):
        validate(helpers.write_shards(tmp_path, [1]), Checks(max_tokens=3))
