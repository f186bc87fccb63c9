"""Ranks that do something together fail together: none waits for one that has given up."""

from collections.abc import Callable
from typing import TypeVar, cast

from vlm import dist
from vlm.errors import CheckpointError

T = TypeVar("T")


def together(action: Callable[[], T]) -> list[T]:
    """``action`` on all ranks; its results, small ones, in rank order.

    Raises:
        CheckpointError: on all ranks, where ``action`` raises it on one.
    """
    answer: T | None = None
    fault: CheckpointError | None = None
    try:
        answer = action()
    except CheckpointError as error:
        fault = error
    answers, faults = zip(*dist.gather_objects((answer, fault)), strict=True)
    for found in faults:
        if found is not None:
            raise found
    return cast(list[T], list(answers))
