"""Runs one function over many shards in processes; results come in the order of the tasks.

Processes start fresh (spawn), so nothing of the parent's threads or locks is inherited. One worker
means none: everything happens in the calling process.
"""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from vlm.errors import TransientError

Task = TypeVar("Task")
Result = TypeVar("Result")


def ordered_map(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Iterator[Result]:
    """``map`` over ``workers`` processes. Function, tasks and results must pickle."""
    tasks = list(tasks)
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context)
    try:
        yield from pool.map(function, tasks)
    except BrokenProcessPool:
        raise TransientError(
            "a worker process died without a word; out of memory? Try again with fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
