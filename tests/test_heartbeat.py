import os
import time
from pathlib import Path

import pytest

from vlm import heartbeat
from vlm.heartbeat import BEAT_FILE, Heartbeat


def test_what_is_said_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "beat"
    assert heartbeat.read(path) is None
    monkeypatch.setenv(BEAT_FILE, str(path))
    heart, before = Heartbeat(), time.time()
    heart.beat("train", 7, ["/data/" + "x" * 5000 + ".tar", "b.tar"])
    found = heartbeat.read(path)
    assert found is not None and (found.phase, found.step) == ("train", 7)
    assert found.shards[0].endswith("xxx.tar") and found.shards[1] == "b.tar"
    assert before <= found.time <= time.time()
    heart.beat("load", 8)
    assert heartbeat.read(path)[:2] == ("load", 8)  # type: ignore[index]
    assert os.path.getsize(path) == heartbeat.SIZE


def test_a_beat_is_whole_whatever_shards_are_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "beat"
    monkeypatch.setenv(BEAT_FILE, str(path))
    heart = Heartbeat()
    for count, named in ((0, 0), (60, 2), (200, 0)):
        heart.beat("train", count, ["\u00e9" * count] * 3 if count else [])
        found = heartbeat.read(path)
        assert found is not None and found.step == count and len(found.shards) == named
        assert os.path.getsize(path) == heartbeat.SIZE


def test_nothing_is_written_where_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BEAT_FILE, raising=False)
    heart = Heartbeat()
    heart.beat("train", 1)
    assert not heart.heard


@pytest.mark.parametrize("content", [b"", b"[1, 2", b"{}", b'["train", "x", 0, []]', b"\xff"])
def test_what_cannot_be_read_is_no_beat(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "beat"
    path.write_bytes(content)
    assert heartbeat.read(path) is None
