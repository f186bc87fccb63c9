import io
import tarfile
from pathlib import Path

import pytest

from tests.data import helpers
from vlm.data.format import shards, tar
from vlm.data.format.rewrite import ShardCopy
from vlm.errors import DataError

MEMBERS = [("a.json", b"{}"), ("a.jpg", b"x" * 1000), ("b.json", b""), ("b.jpg", b"y" * 512)]


def test_ranges_and_renamed_members_make_a_plain_tar(tmp_path: Path) -> None:
    path = helpers.write_tar(tmp_path / "in.tar", MEMBERS)
    output = tmp_path / "new" / "out.tar"
    first, second = shards.scan(path)
    with shards.open_shard(path) as shard, ShardCopy(output) as copy:
        copy.copy(shard.read, second.offset, second.length, "in")
        for member in first.members:
            copy.copy_renamed(shard.read, member, f"z.{member.name}", "in")
        assert not output.exists()
    assert helpers.tar_members(output) == [
        *MEMBERS[2:],
        ("z.a.json", b"{}"),
        ("z.a.jpg", b"x" * 1000),
    ]
    assert [p.name for p in output.parent.iterdir()] == ["out.tar"]


def test_a_renamed_member_has_the_header_that_tarfile_makes(tmp_path: Path) -> None:
    path = helpers.write_tar(tmp_path / "in.tar", MEMBERS, tarfile.PAX_FORMAT)
    with shards.open_shard(path) as shard, ShardCopy(tmp_path / "out.tar") as copy:
        for member in tar.walk(shard.read, shard.num_bytes, "in"):
            copy.copy_renamed(shard.read, member, member.name, "in")
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, body in MEMBERS:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(body), 0o444
            archive.addfile(info, io.BytesIO(body))
    written = (tmp_path / "out.tar").read_bytes()
    assert stream.getvalue().startswith(written)
    assert not any(stream.getvalue()[len(written) :])


def test_what_failed_is_not_there(tmp_path: Path) -> None:
    path = helpers.write_tar(tmp_path / "in.tar", MEMBERS)
    size = path.stat().st_size
    message = f"in: ends at byte {size}, expected {size + 1}"
    with pytest.raises(DataError, match=message), shards.open_shard(path) as shard:
        with ShardCopy(tmp_path / "out" / "x.tar") as copy:
            copy.copy(shard.read, 0, size + 1, "in")
    assert list((tmp_path / "out").iterdir()) == []
