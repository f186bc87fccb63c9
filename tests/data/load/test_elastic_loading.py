"""One sequence of batches: for all ranks and threads, across kills, waits and hours."""

import gc
import itertools
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.data import helpers
from tests.data.conftest import IMAGE_TOKEN
from tests.data.loading import open_loader, steps
from tests.waiting import wait_for
from vlm.config import StorageConfig
from vlm.data.load import loader
from vlm.data.manifest import manifest
from vlm.data.plan.plan import Position
from vlm.errors import TransientError

COUNTS = [(i * 5) % 8 + 1 for i in range(120)] + [0] * 40
NUM_STEPS = 12
ROOT = Path(__file__).parents[3]


class Place(NamedTuple):
    manifest: Path
    tokenizer: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Place:
    folder = tmp_path_factory.mktemp("elastic")
    paths = helpers.write_shards(folder / "shards", COUNTS, per_shard=32)
    manifest.build(paths, str(tokenizer_path), IMAGE_TOKEN, folder / "m.parquet")
    return Place(folder / "m.parquet", tokenizer_path)


@pytest.fixture(scope="module")
def alone(place: Place) -> list[dict[str, Any]]:
    return take(place, NUM_STEPS)


def take(place: Place, count: int, **given: Any) -> list[dict[str, Any]]:
    return list(itertools.islice(steps(open_loader(*place, **given)), count))


def together(place: Place, count: int, world_size: int, **given: Any) -> list[dict[str, Any]]:
    """What all ranks load, step by step."""
    ranks = [
        take(place, count, rank=rank, world_size=world_size, **given) for rank in range(world_size)
    ]
    joined = []
    for own in zip(*ranks, strict=True):
        assert len({json.dumps(one["next"]) for one in own}) == 1
        assert len({len(one["hashes"]) for one in own}) == 1, "as many for every rank"
        hashes = sorted(itertools.chain.from_iterable(one["hashes"] for one in own))
        joined.append({"next": own[0]["next"], "hashes": hashes})
    return joined


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_every_number_of_ranks_and_threads_loads_the_same(
    place: Place, alone: list[dict[str, Any]], world_size: int, threads: int
) -> None:
    assert together(place, 4, world_size, threads=threads) == alone[:4]


def test_ranks_may_change_in_number_on_the_way(place: Place, alone: list[dict[str, Any]]) -> None:
    found: list[dict[str, Any]] = []
    for world_size, threads in ((4, 2), (1, 8), (8, 1), (2, 2)):
        position = Position(**found[-1]["next"]) if found else None
        found += together(place, 3, world_size, threads=threads, position=position)
    assert found == alone


def test_a_killed_process_is_resumed_as_if_nothing_had_been(
    place: Place, alone: list[dict[str, Any]]
) -> None:
    """SIGKILL while threads read ahead; nothing but the last position survives."""
    command = [sys.executable, "-m", "tests.data.loading", *map(str, place), "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    wanted = NUM_STEPS // 2
    with subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(wanted)]
        process.kill()
    assert process.returncode == -signal.SIGKILL
    found = [json.loads(line) for line in lines]
    rest = take(place, NUM_STEPS - wanted, position=Position(**found[-1]["next"]), threads=1)
    assert found + rest == alone


def test_memory_stays_flat(place: Place) -> None:
    """Several epochs; pages that torch, numpy and the allocator keep are there after the first."""

    def resident_mb() -> float:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 1e6

    found = steps(open_loader(*place))
    for _ in range(60):
        next(found)
    held = [resident_mb()]
    for _ in range(3):
        for _ in range(60):
            next(found)
        held.append(resident_mb())
    # what leaks grows each time, what an allocator keeps does not
    growth = min(after - before for before, after in itertools.pairwise(held))
    assert growth < 1.5, f"{held}: frames of so many steps are nearly 4 MB"


# --- shards that cannot be reached ------------------------------------------------------------


@pytest.fixture
def hanging(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """A shard whose file system hangs when it is opened: a pipe that nobody writes to."""
    monkeypatch.setattr(loader, "WATCH_S", 0.1)
    shard = place.manifest.parent / "shards/video-00001.tar"
    kept, pipe = shard.with_suffix(".kept"), shard.with_suffix(".pipe")
    shard.rename(kept)
    os.mkfifo(shard)
    yield shard, kept
    if kept.exists():
        shard.rename(pipe)
        kept.rename(shard)
    release(pipe)


def release(pipe: Path) -> None:
    """Lets go of whoever waits for a writer."""
    os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))


def test_the_watchdog_names_the_shard_and_the_run_goes_on(
    place: Place,
    alone: list[dict[str, Any]],
    hanging: tuple[Path, Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    shard, kept = hanging
    found: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: found.extend(take(place, NUM_STEPS)), daemon=True)
    thread.start()

    def warned() -> list[str]:
        texts = [record.getMessage() for record in caplog.records]
        return [text for text in texts if "no batch for" in text and str(shard) in text]

    wait_for(warned)
    assert "waiting for shard" in warned()[0] and "at byte" in warned()[0]
    pipe = shard.with_suffix(".pipe")
    shard.rename(pipe)
    kept.rename(shard)

    def ended() -> bool:
        release(pipe)  # each thread that hangs opens the pipe for itself
        return not thread.is_alive()

    wait_for(ended)
    assert found == alone


def test_a_shard_that_hangs_for_good_ends_the_run(
    place: Place, hanging: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    brief = StorageConfig(timeout_s=1.0, give_up_s=1.0)
    with pytest.raises(TransientError, match=r"no batch for 3 s; hung at shard .*00001.tar at"):
        take(place, NUM_STEPS, storage=brief)
    assert "leaving behind a read of shard" in caplog.text


def test_a_file_system_that_comes_back_is_waited_for(
    place: Place, alone: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    shards = place.manifest.parent / "shards"
    away = shards.rename(shards.with_name("away"))
    found: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: found.extend(take(place, NUM_STEPS)), daemon=True)
    with caplog.at_level(logging.WARNING):
        thread.start()
        wait_for(lambda: "trying again in" in caplog.text)
        assert not found
        away.rename(shards)
        wait_for(lambda: not thread.is_alive())
    assert found == alone, "nothing was taken for a bad sample"
