"""Waits for what another process does."""

import time
from collections.abc import Callable


def wait_for(happens: Callable[[], object]) -> None:
    for _ in range(6000):
        if happens():
            return
        time.sleep(0.01)
    raise TimeoutError
