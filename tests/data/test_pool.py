import os
import time

import pytest

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


def test_no_tasks() -> None:
    assert list(ordered_map(fails_at_one, [], 4)) == []
