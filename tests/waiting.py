"""Waits for what another thread or process does."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

#: far more than anything here takes, on a machine that is busy with other things
PATIENCE_S = 120.0


def wait_for(happens: Callable[[], T | None], patience_s: float = PATIENCE_S) -> T:
    """Returns what ``happens()`` says as soon as that is true.

    Raises:
        TimeoutError: it never was.
    """
    until = time.monotonic() + patience_s
    while not (found := happens()):
        if time.monotonic() > until:
            raise TimeoutError
        time.sleep(0.01)
    return found
