"""What is not read again: shown by the tokenizer's absence from the second build."""

import hashlib
import os
from pathlib import Path

import pytest

from tests.data import helpers
from tests.data.conftest import IMAGE_TOKEN
from vlm.data.manifest import parts, rows
from vlm.data.manifest.parts import Task
from vlm.data.manifest.rows import Options
from vlm.errors import DataError


@pytest.fixture
def task(tmp_path: Path, tokenizer_path: Path) -> Task:
    (path,) = helpers.write_shards(tmp_path / "s", [2, 0, 3])
    folder = tmp_path / "m.parquet.parts"
    folder.mkdir()
    options = Options(str(tokenizer_path), IMAGE_TOKEN)
    return Task(
        str(path), folder / parts.part_name("s/video-00000.tar"), options, "hash of options"
    )


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the shard is read again")

    monkeypatch.setattr(parts, "index_shard", refuse)


def touch(path: Path, seconds: int = 60) -> None:
    state = path.stat()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + seconds * 10**9))


def test_the_part_is_what_was_found(task: Task) -> None:
    made = parts.make(task)
    assert made == (task.part, True)
    loaded = parts.load(task.part)
    with parts.shards.open_shard(Path(task.shard)) as shard:
        found = rows.index_shard(shard, task.shard, task.options)
    assert loaded == found
    assert loaded.sha256 == hashlib.sha256(Path(task.shard).read_bytes()).hexdigest()
    assert [p.name for p in task.part.parent.iterdir()] == [task.part.name]


def test_what_did_not_change_is_not_read_again(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    parts.make(task)
    before = parts.load(task.part)
    forbid_reading(monkeypatch)
    assert parts.make(task) == (task.part, False)
    touch(Path(task.shard))
    assert parts.make(task) == (task.part, False), "another time, but the same bytes"
    monkeypatch.setattr(parts, "_sha256", None)
    assert parts.make(task) == (task.part, False), "the new time was written down"
    assert parts.load(task.part) == before


def test_what_changed_is_read_again(task: Task, tmp_path: Path) -> None:
    parts.make(task)
    members = helpers.tar_members(Path(task.shard))
    size = Path(task.shard).stat().st_size
    helpers.write_tar(Path(task.shard), [(n, b.replace(b"green", b"brown")) for n, b in members])
    assert Path(task.shard).stat().st_size == size
    touch(Path(task.shard))
    assert parts.make(task).is_new
    assert parts.load(task.part).sha256 == hashlib.sha256(Path(task.shard).read_bytes()).hexdigest()
    helpers.write_tar(Path(task.shard), members[:3])
    assert parts.make(task).is_new
    assert len(parts.load(task.part).batch) == 1


def test_other_options_are_another_reading(task: Task) -> None:
    parts.make(task)
    other = Task(task.shard, task.part, task.options, "other hash")
    assert parts.make(other).is_new
    assert not parts.make(other).is_new
    assert parts.make(task).is_new


@pytest.mark.parametrize("at", [0, 40, -200, -3])
def test_a_damaged_part_is_made_again(task: Task, at: int) -> None:
    parts.make(task)
    before = parts.load(task.part)
    raw = bytearray(task.part.read_bytes())
    raw[at] ^= 255
    task.part.write_bytes(raw)
    parts.make(task)
    assert parts.load(task.part) == before
    task.part.write_bytes(raw[: len(raw) // 2])
    assert parts.make(task).is_new
    assert parts.load(task.part) == before


def test_a_shard_that_cannot_be_used_leaves_no_part(task: Task) -> None:
    Path(task.shard).write_bytes(Path(task.shard).read_bytes()[:700])
    with pytest.raises(DataError, match="truncated"):
        parts.make(task)
    assert list(task.part.parent.iterdir()) == []


def test_parts_of_shards_that_are_gone_are_deleted(task: Task) -> None:
    parts.make(task)
    folder = task.part.parent
    for name in (parts.part_name("gone.tar"), ".left-over.123.tmp"):
        (folder / name).write_bytes(b"x")
    parts.prune(folder, {task.part})
    assert list(folder.iterdir()) == [task.part]
