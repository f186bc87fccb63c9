"""Ranges of shards from disk, HTTP servers and an S3 store, against the file they came from."""

import dataclasses
import errno
import gc
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.data.servers import Server, object_store, serve
from tests.waiting import wait_for
from vlm.data.storage import remote, storage
from vlm.data.storage.cache import RangeCache
from vlm.data.storage.storage import Patience, Storage
from vlm.errors import ConfigError, DataError, TransientError

SIZE = 200_000
#: enough that a busy machine is never taken for a server that stalls
PATIENT = Patience(timeout_s=60.0, give_up_s=60.0, first_wait_s=0.02, longest_wait_s=0.1)
#: for servers that do stall
QUICK = dataclasses.replace(PATIENT, timeout_s=0.5)
BRIEF = Patience(timeout_s=0.3, give_up_s=0.2, first_wait_s=0.02, longest_wait_s=0.1)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "shards" / "a-00000.tar"
    path.parent.mkdir()
    path.write_bytes(random.Random(0).randbytes(SIZE))
    return path


@pytest.fixture
def cache(tmp_path: Path) -> RangeCache:
    return RangeCache(tmp_path / "cache", 10 * SIZE)


def check(found: Storage, location: str, shard: Path) -> None:
    """Ranges everywhere, over the end and behind it, twice, by several threads."""
    whole = shard.read_bytes()
    ranges = [(0, 512), (1, 1000), (4096, 70_000), (SIZE - 100, 100)]
    past = [(SIZE - 50, 100), (SIZE, 10), (SIZE + 1000, 10)]
    with ThreadPoolExecutor(4) as pool:
        for offset, length in 2 * (ranges + past):
            pool.submit(found.read, location, offset, length, "v1")
    for offset, length in 2 * (ranges + past):
        assert found.read(location, offset, length, "v1") == whole[offset : offset + length]
    if remote.is_remote(location):
        assert found.state(location) == found.state(location)
        assert found.state(location).num_bytes == SIZE
    with found.whole(location) as path:
        assert path.read_bytes() == whole


def test_a_local_file(shard: Path) -> None:
    found = Storage(PATIENT)
    check(found, str(shard), shard)
    with found.whole(str(shard)) as path:
        assert path == shard, "no copy"
    assert shard.exists()


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("cached", [True, False])
def test_an_http_server(shard: Path, cache: RangeCache, ranges: bool, cached: bool) -> None:
    with serve(Server(shard.parent, ranges=ranges)) as server:
        check(Storage(PATIENT, cache if cached else None), server.url(shard), shard)


def test_an_s3_store(shard: Path, cache: RangeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    with object_store(monkeypatch) as bucket:
        import s3fs  # an optional dependency: object_store skips without it

        s3fs.S3FileSystem().put(str(shard), f"{bucket}/a/b.tar")
        check(Storage(PATIENT, cache), f"{bucket}/a/b.tar", shard)
        check(Storage(PATIENT), f"{bucket}/a/b.tar", shard)
        with pytest.raises(TransientError, match="shard s3://bucket/a/missing.tar"):
            Storage(BRIEF).read(f"{bucket}/a/missing.tar", 0, 10)


def test_a_range_is_asked_for_once(shard: Path, cache: RangeCache) -> None:
    with serve(Server(shard.parent)) as server:
        for one in (Storage(PATIENT, cache), Storage(PATIENT, RangeCache(cache.folder, 10 * SIZE))):
            for _ in range(3):
                one.read(server.url(shard), 100, 200, "v1")
        assert server.asked == [("/a-00000.tar", "bytes=100-299")]
        one.read(server.url(shard), 100, 200, "v2")
        assert len(server.asked) == 2, "another version is another shard"


def test_a_server_without_ranges_sends_a_shard_once(shard: Path, cache: RangeCache) -> None:
    with serve(Server(shard.parent, ranges=False)) as server:
        one = Storage(PATIENT, cache)
        for offset in range(1000, 50_000, 1000):
            one.read(server.url(shard), offset, 900, "v1")
        whole = [asked for asked in server.asked if not asked[1]]
        assert len(whole) == 1


def test_neighbours_are_fetched_together(shard: Path, cache: RangeCache) -> None:
    parts = [(512, 1000), (1512, 4000), (6000, 300)]
    with serve(Server(shard.parent)) as server:
        one, url = Storage(PATIENT, cache), server.url(shard)
        one.fetch(url, parts, "v1")
        one.fetch(url, parts, "v1")
        for offset, length in parts:
            assert one.read(url, offset, length, "v1") == shard.read_bytes()[offset:][:length]
        assert server.asked == [("/a-00000.tar", "bytes=512-6299")]


@pytest.mark.parametrize("how", ["reset", "stall", "503", "404"])
@pytest.mark.parametrize("ranges", [True, False])
def test_what_passes_is_waited_for(
    shard: Path, cache: RangeCache, how: str, ranges: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with serve(Server(shard.parent, ranges=ranges, failures=2, how=how)) as server:
        url = server.url(shard).replace("//", "//user:secret@") + "?signature=secret"
        found = Storage(QUICK if how == "stall" else PATIENT, cache).read(url, 300, 400, "v1")
    assert found == shard.read_bytes()[300:700]
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings and all("trying again" in text for text in warnings)
    assert all("a-00000.tar" in text and "secret" not in text for text in warnings)


@pytest.mark.parametrize("how", ["reset", "stall", "503"])
def test_what_does_not_pass_is_no_bad_sample(shard: Path, how: str) -> None:
    with serve(Server(shard.parent, failures=1000, how=how)) as server:
        url = server.url(shard) + "?token=secret"
        with pytest.raises(TransientError, match="attempts in 0.2 s") as caught:
            Storage(BRIEF).read(url, 300, 400)
    assert server.url(shard) in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize("how", ["401", "403"])
def test_denied_access_is_not_waited_for(shard: Path, how: str) -> None:
    with serve(Server(shard.parent, failures=1, how=how)) as server:
        url = server.url(shard).replace("//", "//user:secret@")
        with pytest.raises(DataError, match="access denied") as caught:
            Storage(PATIENT).read(url, 300, 400)
    assert "secret" not in str(caught.value) and len(server.asked) == 1


@pytest.mark.parametrize("fault", [errno.ESTALE, errno.EIO, errno.ENOENT, errno.ETIMEDOUT])
def test_a_file_system_that_comes_back(
    shard: Path, fault: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pread, failures = os.pread, [0, 0, 0]

    def failing(fd: int, length: int, offset: int) -> bytes:
        if failures:
            failures.pop()
            raise OSError(fault, os.strerror(fault))
        return pread(fd, length, offset)

    monkeypatch.setattr(storage.os, "pread", failing)
    assert Storage(PATIENT).read(str(shard), 10, 20) == shard.read_bytes()[10:30]
    assert len(caplog.records) == 3 and os.strerror(fault) in caplog.text


def test_a_shard_that_is_gone_is_waited_for_and_then_named(shard: Path) -> None:
    found = Storage(BRIEF)
    hidden = shard.rename(shard.with_suffix(".hidden"))
    with pytest.raises(TransientError, match=r"a-00000\.tar: .*No such file"):
        found.read(str(shard), 0, 10)
    hidden.rename(shard)
    assert len(found.read(str(shard), 0, 10)) == 10


def test_closing_ends_waiting(shard: Path) -> None:
    found = Storage(Patience(first_wait_s=30))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(found.read, str(shard.with_name("none")), 0, 10)
        wait_for(lambda: "none" in found.waits.describe())
        found.close()
        with pytest.raises(storage.Stopped):
            waiting.result()
    found.reopen()
    assert len(found.read(str(shard), 0, 10)) == 10


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[int], list[int]]]:
    """Files opened and closed."""
    gc.collect()  # what other tests left open
    opened: list[int] = []
    closed: list[int] = []
    open_file, close_file = os.open, os.close
    monkeypatch.setattr(
        storage.os, "open", lambda *args: opened.append(open_file(*args)) or opened[-1]
    )
    monkeypatch.setattr(storage.os, "close", lambda fd: closed.append(fd) or close_file(fd))
    yield opened, closed


def test_few_files_stay_open_and_none_after_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: tuple[list[int], list[int]]
) -> None:
    opened, closed = counted
    monkeypatch.setattr(storage, "MAX_OPEN_SHARDS", 2)
    paths = [tmp_path / f"{i}.tar" for i in range(3)]
    for path in paths:
        path.write_bytes(path.name.encode())
    found = Storage(PATIENT)
    for index in (0, 1, 0):
        assert found.read(str(paths[index]), 0, 9) == paths[index].name.encode()
    assert len(opened) == 2 and not closed, "a shard is opened once"
    found.read(str(paths[2]), 0, 9)
    assert len(opened) == 3 and closed == [opened[1]], "the one not used for longest had to go"
    found.close()
    assert sorted(closed) == sorted(opened)


@pytest.mark.parametrize("url", ["gopher://host/a.tar", "ftp://user:secret@host/a.tar"])
def test_other_schemes_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"expected a local path or one of s3://") as caught:
        Storage(PATIENT).read(url, 0, 10)
    assert "secret" not in str(caught.value)
