import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.data import helpers
from tests.data.conftest import IMAGE_TOKEN
from vlm.data import manifest, shards
from vlm.data.validate import Fault, Report, validate
from vlm.errors import DataError

COUNTS = [2, 0, 5, 64, 1, 9]


def brief(report: Report) -> list[tuple[str, str, str, str]]:
    return [(Path(f.shard).name, f.key, f.member, f.fault) for f in report.faults]


def edited(path: Path, edits: dict[str, bytes | None]) -> Path:
    """The shard with members replaced, or dropped where the new body is None."""
    members = [(n, edits.get(n, b)) for n, b in helpers.tar_members(path)]
    return helpers.write_tar(path, [(n, b) for n, b in members if b is not None])


def test_good_shards_are_clean(tmp_path: Path) -> None:
    paths = helpers.write_shards(tmp_path, COUNTS, per_shard=4)
    done: list[tuple[int, int]] = []
    report = validate(paths, progress=lambda *counts: done.append(counts))
    assert report == Report(
        num_shards=2,
        num_samples=6,
        num_bytes=sum(path.stat().st_size for path in paths),
        kinds={"text": 1, "video": 5},
        num_frames=sum(COUNTS),
        frame_buckets={"0": 1, "1-4": 2, "5-8": 1, "9-16": 1, "17-32": 0, "33-64": 1},
        sizes={"16x16": 5},
        faults=[],
    )
    assert done == [(1, 2), (2, 2)]


def test_every_fault_of_a_shard_is_named(tmp_path: Path) -> None:
    (path,) = helpers.write_shards(tmp_path, [2, 2, 3, 1, 2, 1, 0])
    jpeg = shards.encode_jpeg(np.zeros((16, 16, 3), np.uint8))
    edited(
        path,
        {
            "00000000.json": b"{",
            "00000001.000.jpg": None,
            "00000002.001.jpg": b"\x89PNG",
            "00000002.002.jpg": shards.encode_jpeg(np.zeros((8, 8, 3), np.uint8)),
            "00000003.json": None,
            "00000004.001.jpg": jpeg[:-40],
        },
    )
    extra = [("00000005.pyd", b"x"), ("00000005.001.jpg", jpeg), ("00000000.txt", b"late")]
    helpers.write_tar(path, [*helpers.tar_members(path), *extra])
    found = [(key, member, fault) for _, key, member, fault in brief(validate([path]))]
    expected = [
        ("00000005", "00000005.pyd", "is not KEY.EXTENSION"),
        ("00000005", "00000005.001.jpg", "not adjacent"),
        ("00000000", "00000000.txt", "not adjacent"),
        ("00000000", "00000000.json", "Invalid JSON"),
        ("00000001", "00000001.000.jpg", "missing; frame_count is 2"),
        ("00000002", "00000002.001.jpg", "does not decode"),
        ("00000002", "", "16x16 (00000002.000.jpg), 8x8 (00000002.002.jpg)"),
        ("00000003", "00000003.json", "missing"),
        ("00000004", "00000004.001.jpg", "does not decode"),
        ("00000005", "00000005.001.jpg", "unexpected; frame_count is 1"),
    ]
    assert [f[:2] for f in found] == [e[:2] for e in expected]
    for (_, _, text), (_, _, part) in zip(found, expected, strict=True):
        assert part in text


def test_one_flipped_bit_in_a_frame_is_found(tmp_path: Path) -> None:
    (path,) = helpers.write_shards(tmp_path, [1])
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    jpeg = bytearray(shards.encode_jpeg(noise))
    jpeg[len(jpeg) // 2] = 0xFF
    edited(path, {"00000000.000.jpg": bytes(jpeg)})
    ((_, key, member, fault),) = brief(validate([path]))
    assert (key, member) == ("00000000", "00000000.000.jpg")
    assert "does not decode" in fault


def test_damaged_and_empty_shards_do_not_hide_others(tmp_path: Path) -> None:
    paths = helpers.write_shards(tmp_path, COUNTS, per_shard=2)
    data = paths[0].read_bytes()
    paths[0].write_bytes(data[: len(data) // 2 // 512 * 512])
    helpers.write_tar(paths[1], [])
    report = validate(paths)
    faults = brief(report)
    assert [f[0] for f in faults] == ["video-00000.tar", "video-00001.tar"]
    assert "truncated" in faults[0][3]
    assert faults[1][3] == "holds no sample"
    assert report.num_samples == 4


def test_keys_and_sizes_over_shards(tmp_path: Path) -> None:
    first, second = (helpers.write_shards(tmp_path / n, [1, 1, 1])[0] for n in "ab")
    small = shards.encode_jpeg(np.zeros((8, 8, 3), np.uint8))
    members = [(n.replace("00000002", "00000009"), b) for n, b in helpers.tar_members(second)]
    helpers.write_tar(second, [(n, small if n == "00000009.000.jpg" else b) for n, b in members])
    odd_size = ("00000009", "", "frames of 8x8, most have 16x16")
    assert validate([first, second]).faults == [Fault(str(second), *odd_size)]
    beside = second.rename(first.with_name("video-00001.tar"))  # now of one data set
    assert validate([first, beside]).faults == [
        Fault(str(beside), "00000000", "", f"the key is also in {first}"),
        Fault(str(beside), "00000001", "", f"the key is also in {first}"),
        Fault(str(beside), *odd_size),
    ]


def test_a_sample_of_each_shard(tmp_path: Path) -> None:
    paths = helpers.write_shards(tmp_path, [1] * 20, per_shard=10)
    edited(paths[0], {"00000000.000.jpg": b"x", "00000001.000.jpg": b"x"})
    assert validate(paths, decode=3).sizes == {"16x16": 5}
    assert [f.key for f in validate(paths, decode=3).faults] == ["00000000"]
    assert [f.key for f in validate(paths, decode=100).faults] == ["00000000", "00000001"]


def test_against_the_manifest(tokenizer_path: Path, tmp_path: Path) -> None:
    paths = helpers.write_shards(tmp_path / "s", [1] * 8, per_shard=2)
    output = tmp_path / "m.parquet"
    manifest.build(paths[:3], str(tokenizer_path), IMAGE_TOKEN, output)
    assert validate(paths[:3], output).faults == []
    data = paths[1].read_bytes()
    # a byte of padding: every member is as it was
    paths[1].write_bytes(data[:600] + b"x" + data[601:])
    shutil.copy(paths[3], paths[2])
    found = {(f.shard, f.fault.partition(" ")[0]) for f in validate(paths, output).faults}
    assert (str(paths[1]), "its") in found
    assert (str(paths[2]), "its") in found
    assert (str(paths[3]), "not") in found
    paths[0].unlink()
    faults = validate(paths[1:2], output).faults
    assert faults[-2:] == [
        Fault(str(paths[0]), "", "", "missing"),
        Fault(str(paths[2]), "", "", "in the manifest, but not among the paths"),
    ]
    with pytest.raises(DataError, match="build_manifest"):
        validate(paths[1:2], paths[1])
