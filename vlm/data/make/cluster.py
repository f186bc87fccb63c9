"""Runs one function over many shards on a Ray cluster; results come in the order of the tasks.

Every machine needs this package and must see the same files under the same paths. Ray is optional
(``pip install saccade[ray]``). Not here: processes of one machine (`vlm.data.pool`).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from vlm.errors import ConfigError, TransientError

Task = TypeVar("Task")
Result = TypeVar("Result")

#: of a task whose worker died: a machine was taken away, or memory ran out
MAX_RETRIES = 3
#: tasks that wait on the cluster for each of its cores
_AHEAD = 2


def ray_map(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    address: str | None = None,
    workers: int | None = None,
) -> Iterator[Result]:
    """``map`` over the cores of a cluster, one for each task that runs.

    Args:
        address: Of a cluster, ``auto`` for the one this machine belongs to; None starts one here.
        workers: Cores of the cluster that is started here; None for all.

    Raises:
        ConfigError: Ray is not installed.
        TransientError: there is no cluster at the address, or a task's worker died again and again.
    """
    ray = _import_ray()
    is_ours = not ray.is_initialized()
    if is_ours:
        _connect(ray, address, workers)
    try:
        # a task may run again: it writes its shard aside and gives it its name at the end
        remote = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(function)
        num_ahead = max(2, _AHEAD * int(ray.cluster_resources().get("CPU", 1)))
        queue = iter(tasks)
        running: deque[Any] = deque()
        while True:
            running.extend(map(remote.remote, islice(queue, num_ahead - len(running))))
            if not running:
                return
            yield _result(ray, running.popleft())
    finally:
        if is_ours:
            ray.shutdown()


def _connect(ray: Any, address: str | None, workers: int | None) -> None:
    num_cpus = workers if address is None else None
    try:
        ray.init(address or "local", num_cpus=num_cpus, log_to_driver=False, logging_level="error")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise TransientError(f"no Ray cluster at {address or 'this machine'}: {error}") from None


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        # Ray puts the worker's traceback into the message; what was raised there says enough
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise TransientError(
            f"a task died on the cluster {MAX_RETRIES + 1} times; out of memory? {error}"
        ) from None


def _import_ray() -> Any:
    try:
        # an optional dependency
        import ray
    except ImportError:
        raise ConfigError("Ray is not installed; pip install saccade[ray]") from None
    return ray
