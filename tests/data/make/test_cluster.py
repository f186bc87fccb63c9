import functools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.data.clips import write_clip
from tests.data.make.test_precompute import contents, source
from tests.tools.run_tool import run_tool
from vlm.data.make import precompute
from vlm.data.make.cluster import ray_map
from vlm.data.pool import ordered_map
from vlm.errors import ConfigError, DataError, TransientError

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install saccade[ray]")
SETTINGS = precompute.Settings(size=32, samples_per_shard=2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a real cluster with two workers on this machine."""
    root = str(Path(__file__).parents[3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
        context = ray.init(
            "local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100 << 20,
        )
        yield context.address_info["address"]
        ray.shutdown()


def slow_first(task: int) -> tuple[int, int]:
    time.sleep(0.5 if task == 0 else 0)
    return task, os.getpid()


def fails_at_one(task: int) -> int:
    if task == 1:
        raise DataError("shard 1 is bad")
    return task


def dies(folder: str) -> None:
    Path(folder, f"{time.time_ns()}.run").touch()
    os._exit(1)


def test_results_come_in_the_order_of_the_tasks(cluster: str) -> None:
    results = list(ray_map(slow_first, range(20)))
    assert [task for task, _ in results] == list(range(20))
    assert os.getpid() not in {pid for _, pid in results}


def test_errors_arrive_as_they_were(cluster: str) -> None:
    results = ray_map(fails_at_one, range(50))
    assert next(results) == 0
    with pytest.raises(DataError, match="^shard 1 is bad$"):
        next(results)


def test_tasks_are_sent_as_they_are_needed(cluster: str) -> None:
    taken = 0

    def endless() -> Iterator[int]:
        nonlocal taken
        while True:
            taken += 1
            yield 0

    results = ray_map(slow_first, endless())
    next(results)
    assert taken <= 4
    results.close()  # type: ignore[attr-defined]


def test_a_worker_that_dies_is_tried_again_and_then_one_error(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm.data.make.cluster.MAX_RETRIES", 1)
    with pytest.raises(TransientError, match="died on the cluster 2 times"):
        list(ray_map(dies, [str(tmp_path)]))
    assert len(list(tmp_path.glob("*.run"))) == 2


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    lines: list[dict[str, Any]] = [{"caption": "text"}]
    for seconds in range(1, 5):
        write_clip(tmp_path / f"{seconds}.mp4", 8 * seconds)
        lines.append({"video": f"{seconds}.mp4", "caption": f"{seconds} s"})
    lines.append({"video": "gone.mp4", "caption": "x"})
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_shards_are_those_of_processes(
    cluster: str, annotations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # workers of a cluster have another working directory
    monkeypatch.chdir(tmp_path)
    here = source(Path("a.jsonl"))
    engine = functools.partial(ordered_map, workers=1)
    precompute.run(here, Path("one"), SETTINGS, engine, lambda *_: None)
    report = precompute.run(here, Path("two"), SETTINGS, ray_map, lambda *_: None)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert report.num_written == 5
    (tmp_path / "two" / "video-00001.tar").unlink()
    report = precompute.run(here, Path("two"), SETTINGS, ray_map, lambda *_: None)
    assert (report.num_written, report.num_present) == (2, 3)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_tool(cluster: str, annotations: Path, tmp_path: Path) -> None:
    command = ["video", "--annotations", annotations, "--output", tmp_path / "o", "--size", 32]
    result = run_tool("precompute", *command, "--engine", "ray", "--ray-address", cluster)
    assert result.returncode == 0, result.stderr
    assert "5 samples, 10 frames" in result.stdout


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install saccade\[ray\]"):
        list(ray_map(fails_at_one, [0]))
