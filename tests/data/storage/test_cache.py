"""A folder that never grows past its bound, shared by threads and processes."""

import fcntl
import multiprocessing
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vlm.data.storage.cache import RangeCache
from vlm.errors import ConfigError


def body(index: int, size: int = 1000) -> bytes:
    return random.Random(index).randbytes(size)


def put(cache: RangeCache, index: int, size: int = 1000) -> None:
    cache.put(("shard", "v", index, size), memoryview(body(index, size)))


def get(cache: RangeCache, index: int, size: int = 1000) -> bytes | None:
    return cache.get(("shard", "v", index, size))


def test_what_was_put_is_there_for_every_process(tmp_path: Path) -> None:
    one, other = RangeCache(tmp_path, 10_000), RangeCache(tmp_path, 10_000)
    put(one, 3)
    assert get(other, 3) == body(3) and get(other, 4) is None
    assert other.has(("shard", "v", 3, 1000)) and not other.has(("shard", "w", 3, 1000))
    other.drop(("shard", "v", 3, 1000))
    other.drop(("shard", "v", 3, 1000))
    assert get(one, 3) is None


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 20_000)
    for index in range(200):
        put(cache, index)
        assert get(cache, 0) == body(0), "used all the time"
        assert cache.num_bytes() <= 20_000
    assert get(cache, 199) == body(199) and get(cache, 5) is None
    assert cache.num_bytes() > 10_000


def test_threads_share_it(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 50_000)

    def work(index: int) -> bool:
        put(cache, index % 60)
        found = get(cache, index % 60)
        return found is None or found == body(index % 60)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(600)))
    assert cache.num_bytes() <= 50_000


def _fill(folder: Path, first: int) -> None:
    cache = RangeCache(folder, 100_000)
    for index in range(first, first + 150):
        put(cache, index)


def test_processes_share_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_fill, args=(tmp_path, n)) for n in (0, 100)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    cache = RangeCache(tmp_path, 100_000)
    assert cache.num_bytes() <= 100_000
    kept = [index for index in range(250) if get(cache, index) is not None]
    assert len(kept) > 50 and all(get(cache, index) == body(index) for index in kept)


def test_nobody_writes_on_while_another_process_clears_it(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 20_000)
    filling = threading.Thread(target=lambda: [put(cache, index) for index in range(100)])
    with (tmp_path / "evict.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        filling.start()
        filling.join(0.3)
        assert cache.num_bytes() <= 20_000
    filling.join()
    assert 10_000 < cache.num_bytes() <= 20_000


def test_a_whole_file_is_fetched_by_one(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 50_000)
    fetched: list[int] = []

    def download(path: Path) -> None:
        fetched.append(1)
        time.sleep(0.1)
        path.write_bytes(body(1))

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(cache.whole, ("shard", "v"), download) for _ in range(4)]
        assert {future.result().read_bytes() for future in futures} == {body(1)}
    assert len(fetched) == 1


def test_a_failed_download_leaves_nothing(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 50_000)

    def download(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        cache.whole(("shard", "v"), download)
    assert cache.num_bytes() == 0


def test_what_a_killed_process_left_is_cleared_too(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, 20_000)
    put(cache, 0)
    left = next(tmp_path.glob("??")) / "left.tmp"
    left.write_bytes(bytes(15_000))
    os.utime(left, (1, 1))
    for index in range(1, 20):
        put(cache, index)
    assert not left.exists()


def test_a_full_disk_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = RangeCache(tmp_path, 20_000)

    def full(self: Path, data: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    put(cache, 0)
    put(cache, 1)
    assert get(cache, 0) is None
    assert len(caplog.records) == 1 and "No space left" in caplog.text


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match="cache_dir .*file"):
        RangeCache(file, 1000)
