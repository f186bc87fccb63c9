import io
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlm.data.make import archives
from vlm.data.make.archives import MissingMediaError, open_archive
from vlm.errors import SampleError

FILES = {"a/1.mp4": b"one", "b 2.jpg": b"two" * 1000, "c.txt": b""}


def make_zip(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.mkdir("a")
        for name, body in FILES.items():
            file.writestr(name, body)
    return path


def make_tar(path: Path) -> Path:
    with tarfile.open(path, "w") as file:
        for name, body in FILES.items():
            info = tarfile.TarInfo("./" + name)
            info.size = len(body)
            file.addfile(info, io.BytesIO(body))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    return path


def make_parquet(path: Path, num_rows: int = 100) -> Path:
    image = [{"bytes": b"i%d" % i, "path": "x"} if i % 7 else None for i in range(num_rows)]
    images = [[{"bytes": b"%d-%d" % (i, k)} for k in range(i % 3)] for i in range(num_rows)]
    raw = [b"r%d" % i for i in range(num_rows)]
    table = pa.table({"image": image, "images": images, "raw": raw, "text": ["x"] * num_rows})
    pq.write_table(table, path, row_group_size=30)
    return path


@pytest.mark.parametrize(("make", "name"), [(make_zip, "A.ZIP"), (make_tar, "a.tar")])
def test_members(tmp_path: Path, make: object, name: str) -> None:
    archive = open_archive(make(tmp_path / name))  # type: ignore[operator]
    assert list(archive.names()) == list(FILES)
    for member, body in FILES.items():
        assert archive.read(member) == body
    for member in ("a/2.mp4", "link.jpg", "a"):
        with pytest.raises(MissingMediaError, match="is not there"):
            archive.read(member)
    archive.close()


def test_cells_in_any_order(tmp_path: Path) -> None:
    archive = open_archive(make_parquet(tmp_path / "a.parquet"))
    for row in [0, 1, 31, 99, 98, 2, 2, 45, 64, 65, 33]:
        assert archive.read(f"{row}/raw") == b"r%d" % row
        if row % 7:
            assert archive.read(f"{row}/image") == b"i%d" % row
            assert archive.read(f"{row}/image/bytes") == b"i%d" % row
        for k in range(row % 3):
            assert archive.read(f"{row}/images/{k}") == b"%d-%d" % (row, k)
    assert len(list(archive.names())) == 400
    archive.close()


@pytest.mark.parametrize(
    "member",
    ["7/image", "100/raw", "3/none", "-1/raw", "x", "4/images/1", "4/images/x", "4/image/y"],
)
def test_cells_that_are_not_there(tmp_path: Path, member: str) -> None:
    archive = open_archive(make_parquet(tmp_path / "a.parquet"))
    with pytest.raises(MissingMediaError):
        archive.read(member)


def test_cells_that_are_no_bytes(tmp_path: Path) -> None:
    archive = open_archive(make_parquet(tmp_path / "a.parquet"))
    with pytest.raises(SampleError, match="holds str"):
        archive.read("0/text")


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.parquet"])
def test_damage_is_one_kind_of_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"garbage" * 1000)
    with pytest.raises(SampleError, match=f"{name} cannot be read"):
        open_archive(tmp_path / name)


def test_flipped_bytes_in_a_zip(tmp_path: Path) -> None:
    data = bytearray(make_zip(tmp_path / "a.zip").read_bytes())
    at = data.index(b"a/1.mp4") + len("a/1.mp4")
    data[at : at + 3] = b"\xff\xff\xff"
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(SampleError, match="a.zip, member 'a/1.mp4'"):
        open_archive(tmp_path / "a.zip").read("a/1.mp4")


def test_a_truncated_tar(tmp_path: Path) -> None:
    data = make_tar(tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: data.index(b"twotwo") + 100])
    with pytest.raises(SampleError, match="a.tar"):
        open_archive(tmp_path / "a.tar").read("b 2.jpg")


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 2)
    for archive, member in (
        (open_archive(make_zip(tmp_path / "a.zip")), "a/1.mp4"),
        (open_archive(make_tar(tmp_path / "a.tar")), "a/1.mp4"),
        (open_archive(make_parquet(tmp_path / "a.parquet")), "10/raw"),
    ):
        with pytest.raises(SampleError, match="3 bytes, at most 2"):
            archive.read(member)


def test_other_kinds(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="unpack it first"):
        open_archive(tmp_path / "a.tar.gz")
