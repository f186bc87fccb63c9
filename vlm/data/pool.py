"""Runs one function over many shards in processes; results come in the order of the tasks.

Processes start fresh (spawn), so nothing of the parent's threads or locks is inherited, and end
when it does, even by SIGKILL. One worker means none: everything happens in the calling process.
Not here: machines of a cluster (`vlm.data.make.cluster`).
"""

import multiprocessing
import os
import threading
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
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)
    try:
        yield from pool.map(function, tasks)
    except BrokenProcessPool:
        raise TransientError(
            "a worker process died without a word; out of memory? Try again with fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for tasks for ever, or write beside the next
    run."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker only"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent watch").start()
