import os
import zipfile
from pathlib import Path

import psutil
import pytest

from vlm.data.make import media
from vlm.data.make.archives import MissingMediaError
from vlm.data.make.media import MediaReader, parse_ref
from vlm.errors import SampleError, TransientError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "clips").mkdir(parents=True)
    (tmp_path / "root" / "clips" / "a!.mp4").write_bytes(b"file")
    with zipfile.ZipFile(tmp_path / "root" / "x.zip", "w") as file:
        file.writestr("b/a.mp4", b"member")
    (tmp_path / "secret").write_bytes(b"secret")
    return tmp_path / "root"


def test_refs() -> None:
    assert parse_ref("a/b.mp4") == ("a/b.mp4", "")
    assert parse_ref("a!b.mp4") == ("a!b.mp4", "")
    assert parse_ref("d/x.ZIP!a/b!.mp4") == ("d/x.ZIP", "a/b!.mp4")
    assert parse_ref("x.tar!y.tar!z") == ("x.tar", "y.tar!z")
    assert parse_ref("p.parquet!3/image") == ("p.parquet", "3/image")
    # what a member is called opens nothing
    assert parse_ref("x.zip!../a") == ("x.zip", "../a")


@pytest.mark.parametrize("ref", ["", ".", "/a", "../a", "a/../../b", "../x.zip!a", "a\0b"])
def test_refs_that_lead_out(root: Path, ref: str) -> None:
    with pytest.raises(ValueError, match="leads out"):
        parse_ref(ref)
    with MediaReader(root) as reader, pytest.raises(SampleError, match="leads out"):
        reader.open(ref)


def test_files_and_members(root: Path) -> None:
    with MediaReader(root) as reader:
        for ref, body in (("clips/a!.mp4", b"file"), ("x.zip!b/a.mp4", b"member")) * 2:
            with reader.open(ref) as file:
                assert file.read() == body
                assert file.seek(1) == 1


def test_links_do_not_lead_out(root: Path) -> None:
    (root / "out.mp4").symlink_to(root.parent / "secret")
    (root / "up").symlink_to("..")
    (root / "in.mp4").symlink_to("clips/a!.mp4")
    with MediaReader(root) as reader:
        assert reader.open("in.mp4").read() == b"file"
        for ref in ("out.mp4", "up/secret"):
            with pytest.raises(SampleError, match="link out of the root"):
                reader.open(ref)


def test_the_hub_cache_links_to_its_blobs(tmp_path: Path) -> None:
    snapshot = tmp_path / "datasets--x" / "snapshots" / "rev"
    snapshot.mkdir(parents=True)
    (tmp_path / "datasets--x" / "blobs").mkdir()
    (tmp_path / "datasets--x" / "blobs" / "h").write_bytes(b"blob")
    (snapshot / "a.jpg").symlink_to("../../blobs/h")
    with MediaReader(snapshot) as reader:
        assert reader.open("a.jpg").read() == b"blob"


def test_what_is_not_there(root: Path) -> None:
    os.mkfifo(root / "pipe.mp4")
    with MediaReader(root) as reader:
        for ref in ("no.mp4", "clips", "clips/a!.mp4/x", "no.zip!a", "x.zip!a", "pipe.mp4"):
            with pytest.raises(MissingMediaError):
                reader.open(ref)


def test_a_file_system_that_vanished_is_no_missing_file(root: Path) -> None:
    with MediaReader(root) as reader:
        root.rename(root.with_name("gone"))
        with pytest.raises(TransientError, match="try again"):
            reader.open("clips/a!.mp4")


def test_sizes_are_bounded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "MAX_FILE_BYTES", 3)
    with MediaReader(root) as reader, pytest.raises(SampleError, match="4 bytes, at most 3"):
        reader.open("clips/a!.mp4")


def num_open(root: Path) -> int:
    """Files below it that this process has open."""
    return sum(Path(one.path).is_relative_to(root) for one in psutil.Process().open_files())


def test_few_archives_stay_open(root: Path) -> None:
    for i in range(20):
        (root / f"{i}.zip").write_bytes((root / "x.zip").read_bytes())
    with MediaReader(root) as reader:
        for i in range(20):
            assert reader.open(f"{i}.zip!b/a.mp4").read() == b"member"
        assert 0 < num_open(root) <= media.MAX_OPEN_ARCHIVES
    assert num_open(root) == 0
