import hashlib
import tarfile
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import webdataset

from tests.data import helpers
from vlm.data.format import schema, shards
from vlm.data.format.layout import Content, read_content
from vlm.errors import DataError, SampleError

COUNTS = [2, 0, 64, 1, 3]


def read(path: Path, index: int) -> bytes:
    found = list(shards.scan(path))[index]
    return path.read_bytes()[found.offset : found.offset + found.length]


def read_sample(buffer: bytes) -> Content:
    return read_content(shards.read_members(buffer, "here"), "here")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    (path,) = helpers.write_shards(tmp_path, COUNTS)
    for i, count in enumerate(COUNTS):
        content = read_sample(read(path, i))
        assert content.sample == helpers.make_sample(i, count)
        decoded = [simplejpeg.decode_jpeg(j, strict=True) for j in content.images.values()]
        assert len(decoded) == count
        for found, original in zip(decoded, helpers.make_frames(i, count), strict=True):
            assert np.abs(found.astype(int) - original).mean() < 2


def test_tarfile_and_webdataset_read_it_too(tmp_path: Path) -> None:
    (path,) = helpers.write_shards(tmp_path, COUNTS)
    names = [name for name, _ in helpers.tar_members(path)]
    assert names[:3] == ["00000000.json", "00000000.000.jpg", "00000000.001.jpg"]
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
    assert [s["__key__"] for s in samples] == [f"{i:08d}" for i in range(5)]
    for sample, count in zip(samples, COUNTS, strict=True):
        assert schema.parse_sample(sample["json"], "x").frame_count == count
        assert sum(name.endswith(".jpg") for name in sample) == count


def test_scan_ranges_tile_the_file(tmp_path: Path) -> None:
    (path,) = helpers.write_shards(tmp_path, COUNTS)
    found = list(shards.scan(path))
    position = 0
    for sample in found:
        assert sample.offset == position
        position += sample.length
    assert not any(path.read_bytes()[position:])


def test_the_bytes_are_the_same_every_time(tmp_path: Path) -> None:
    digests = [
        [
            hashlib.sha256(p.read_bytes()).hexdigest()
            for p in helpers.write_shards(folder, COUNTS, 2)
        ]
        for folder in (tmp_path / "a", tmp_path / "b")
    ]
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == 3
    with tarfile.open(tmp_path / "a" / "video-00000.tar") as archive:
        for info in archive:
            assert (info.mtime, info.uname, info.gname, info.uid, info.gid) == (0, "", "", 0, 0)
            assert info.pax_headers == {}


def test_shards_appear_only_when_they_are_whole(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), shards.ShardWriter(tmp_path, "video", 2) as writer:
        for i in range(3):
            writer.write(i, helpers.make_sample(i, 1), helpers.make_frames(i, 1))
        assert [p.name for p in tmp_path.glob("*.tar")] == ["video-00000.tar"]
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["video-00000.tar"]


def test_a_writer_without_samples_writes_nothing(tmp_path: Path) -> None:
    with shards.ShardWriter(tmp_path, "video", 2):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (["a.json", "b.json", "a.txt"], "'a' appears again"),
        (["a.json", "a.json"], "second member 'a.json'"),
        (["a.json", "../a.txt"], "in a folder"),
        (["/etc/a.json"], "in a folder"),
        (["./a.json"], "in a folder"),
        (["x/a.json"], "in a folder"),
        ([".a.json"], "hidden"),
        (["a.json", "a.pyd"], "'a.pyd' is not KEY.EXTENSION"),
        (["a.json", "a.jpg.pickle"], "not KEY.EXTENSION"),
        (["a.json", "a.other.json"], "nor a frame KEY.000.jpg"),
        (["a.json", "a.0.en.txt"], "not KEY.EXTENSION"),
        (["a.JSON"], "not KEY.EXTENSION"),
        (["a"], "not KEY.EXTENSION"),
        (["a\x1b[2J.json"], "not KEY.EXTENSION"),
    ],
)
def test_names_that_no_shard_has(tmp_path: Path, names: list[str], fault: str) -> None:
    path = helpers.write_tar(tmp_path / "bad.tar", [(name, b"{}") for name in names])
    with pytest.raises(DataError, match=fault) as caught:
        list(shards.scan(path))
    assert "bad.tar at byte" in str(caught.value)
    if "again" not in fault:
        with pytest.raises(SampleError, match=fault):
            shards.read_members(path.read_bytes()[: 1024 * len(names)], "here")


def test_links_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "link.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        info = tarfile.TarInfo("a.json")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(DataError, match="a symbolic link"):
        list(shards.scan(path))
    with pytest.raises(SampleError, match="a symbolic link"):
        shards.read_members(path.read_bytes()[:512], "here")


def test_a_range_that_is_no_sample(tmp_path: Path) -> None:
    (path,) = helpers.write_shards(tmp_path, [2, 3])
    first, second = read(path, 0), read(path, 1)
    for buffer, fault in (
        (first + second, "not of one key"),
        (b"", "not of one key"),
        (first[512:], "no valid tar header"),
        (first[:-512], "truncated"),
        (first[:-100], "truncated"),
        (first[:1024], "frame_count is 2 but there are 0 images"),
        (first[1024:], "nothing to learn"),
    ):
        with pytest.raises(SampleError, match=fault):
            read_sample(buffer)


def test_find_shards(tmp_path: Path) -> None:
    paths = helpers.write_shards(tmp_path / "s", [1, 1], per_shard=1)
    assert shards.find_shards([tmp_path / "s", paths[0]]) == paths
    (tmp_path / "empty").mkdir()
    for bad, fault in (("empty", "holds no"), ("none", "no such file")):
        with pytest.raises(DataError, match=fault):
            shards.find_shards([tmp_path / bad])
