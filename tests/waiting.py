"""Waits for what another thread or process does."""

import time
from collections.abc import Callable

#: far more than anything here takes, on a machine that is busy with other things
PATIENCE_S = 120.0


def wait_for(happens: Callable[[], object]) -> None:
    """Returns as soon as ``happens()`` is true.

    Raises:
        TimeoutError: it never was.
    """
    until = time.monotonic() + PATIENCE_S
    while not happens():
        if time.monotonic() > until:
            raise TimeoutError
        time.sleep(0.01)
