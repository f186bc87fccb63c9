import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data import helpers
from vlm.data.format import shards, tar
from vlm.errors import DataError

MEMBERS = [("a.json", b"{}"), ("a.000.jpg", b"x" * 700), ("b.json", b""), ("b.txt", b"y" * 512)]


def walk(data: bytes) -> list[tar.Member]:
    return list(tar.walk(lambda at, size: data[at : at + size], len(data), "t.tar"))


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_it_finds_what_tarfile_finds(tmp_path: Path, tar_format: int) -> None:
    path = helpers.write_tar(tmp_path / "t.tar", MEMBERS, tar_format)
    with tarfile.open(path) as archive:
        expected = [(m.name, m.offset, m.offset_data, m.size) for m in archive]
    assert [(m.name, m.start, m.offset, m.size) for m in walk(path.read_bytes())] == expected


def test_times_and_owners_in_pax_headers_are_harmless(tmp_path: Path) -> None:
    """What webdataset's own writer makes when it is given no time."""
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, body in MEMBERS:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname = len(body), 1234567.5, "Gr\u00fc\u00dfe"
            archive.addfile(info, io.BytesIO(body))
    members = walk(path.read_bytes())
    assert [m.name for m in members] == [name for name, _ in MEMBERS]
    assert [path.read_bytes()[m.offset :][: m.size] for m in members] == [b for _, b in MEMBERS]
    assert [a.end for a in members[:-1]] == [b.start for b in members[1:]]
    found = list(shards.scan(path))
    for sample in found:
        buffer = path.read_bytes()[sample.offset :][: sample.length]
        assert list(shards.read_members(buffer, "x")) == [m.name for m in sample.members]


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_are_refused(tmp_path: Path, tar_format: int) -> None:
    path = helpers.write_tar(tmp_path / "t.tar", [("k" * 120 + ".json", b"{}")], tar_format)
    with pytest.raises(DataError, match="shorter than 90 bytes"):
        walk(path.read_bytes())


def test_the_ustar_prefix_is_part_of_the_name(tmp_path: Path) -> None:
    name = "d" * 60 + "/" + "e" * 60 + ".json"
    path = helpers.write_tar(tmp_path / "t.tar", [(name, b"{}")])
    assert walk(path.read_bytes())[0].name == name


def test_odd_types_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo("a.json")
            info.type, info.linkname, info.size = kind, "/etc/passwd", 0
            archive.addfile(info)
        archive.addfile(tarfile.TarInfo("b.json"))
    types = [member.odd_type for member in walk(path.read_bytes())]
    assert types == ["a symbolic link", "a hard link", "a character device", "a folder", ""]


def truncate(at: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:at]


def flip(at: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def set_size(text: bytes) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        header = bytearray(data[:512])
        header[124:136] = text.ljust(12, b"\0")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        return bytes(header) + data[512:]

    return edit


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (truncate(0), "truncated"),
        (truncate(100), "truncated"),
        (truncate(700), "byte 0: truncated, member 'a.json' needs 2 bytes, 188 are left"),
        (truncate(1024), "byte 1024: truncated"),
        (truncate(2000), "byte 1024: truncated, member 'a.000.jpg'"),
        (flip(3), "byte 0: no valid tar header"),
        (flip(1024 + 124), "byte 1024: no valid tar header"),
        (lambda data: data + b"x" * 512, "follow the end"),
        (lambda data: data + data, "follow the end"),
        (lambda data: data + bytes(2 << 20), "follow the end"),
        (set_size(b"77777777777"), "truncated, member 'a.json' needs 8589934591 bytes"),
        (set_size(b"-1"), "negative size"),
        (set_size(b"9"), "octal size"),
        (set_size(b"\x80" + bytes(10) + b"\x02"), "octal size"),
        (lambda data: b"\x1f\x8b" + data[2:], "no plain tar"),
    ],
)
def test_damage_is_named(tmp_path: Path, edit: Callable[[bytes], bytes], fault: str) -> None:
    data = helpers.write_tar(tmp_path / "t.tar", MEMBERS).read_bytes()
    with pytest.raises(DataError, match=fault):
        walk(edit(data))


def test_no_cut_goes_unnoticed(tmp_path: Path) -> None:
    """The last members' blocks, the end marker: wherever a copy stopped, it shows."""
    data = helpers.write_tar(tmp_path / "t.tar", MEMBERS).read_bytes()
    end = len(data.rstrip(b"\0"))
    marker = end + (-end) % 512 + 1024
    for at in range(0, marker, 128):
        with pytest.raises(DataError):
            walk(data[:at])
    assert len(walk(data[:marker])) == len(MEMBERS)
