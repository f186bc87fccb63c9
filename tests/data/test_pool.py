import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.waiting import wait_for
from vlm.data.pool import ordered_map
from vlm.errors import DataError, TransientError


def slow_first(task: int) -> tuple[int, int]:
    time.sleep(0.3 if task == 0 else 0)
    return task, os.getpid()


def fails_at_one(task: int) -> int:
    if task == 1:
        raise DataError("shard 1 is bad")
    return task


def dies(task: int) -> None:
    os._exit(1)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_tasks(workers: int) -> None:
    results = list(ordered_map(slow_first, range(5), workers))
    assert [task for task, _ in results] == [0, 1, 2, 3, 4]
    assert (os.getpid() in {pid for _, pid in results}) == (workers == 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_arrive_as_they_were(workers: int) -> None:
    results = ordered_map(fails_at_one, range(50), workers)
    assert next(results) == 0
    with pytest.raises(DataError, match="^shard 1 is bad$"):
        next(results)


def test_a_worker_that_dies_is_one_error() -> None:
    with pytest.raises(TransientError, match="died"):
        list(ordered_map(dies, range(2), 2))


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = (
        "from tests.data.test_pool import leaves_its_id_and_sleeps as function\n"
        "from vlm.data.pool import ordered_map\n"
        f"if __name__ == '__main__': list(ordered_map(function, [{str(tmp_path)!r}] * 2, 2))\n"
    )
    (tmp_path / "main.py").write_text(script)
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root}
    child = subprocess.Popen([sys.executable, str(tmp_path / "main.py")], env=environment)
    wait_for(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    pids = [int(path.stem) for path in tmp_path.glob("*.pid")]
    child.kill()
    child.wait()
    wait_for(lambda: not any(is_running(pid) for pid in pids))


def leaves_its_id_and_sleeps(folder: str) -> None:
    Path(folder, f"{os.getpid()}.pid").touch()
    time.sleep(120)


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_no_tasks() -> None:
    assert list(ordered_map(fails_at_one, [], 4)) == []
