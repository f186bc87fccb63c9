"""A job's folder: who holds it, and a launcher that outlives the shell it was started from.

Not here: what is written there (``vlm.nodes.launcher.record``).
"""

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from vlm.errors import ConfigError
from vlm.nodes.launcher.record import STATE

LOCK, OUTPUT = "lock", "launcher.log"
#: for a detached launcher to take hold of its folder
DETACH_S = 120.0
MAX_BYTES = 2**24


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """
    Raises:
        ConfigError: another launcher holds it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a")
    except OSError as error:
        raise ConfigError(
            f"job folder {folder}: {error.strerror}; expected one that can be written"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"job folder {folder}: a launcher holds it; python launch/status.py {folder} shows "
                "its job, and --stop ends it"
            ) from None
        yield


def read(folder: Path) -> dict[str, Any]:
    """The state of the job.

    Raises:
        ConfigError: there is none.
    """
    try:
        with (folder / STATE).open("rb") as file:
            found = json.loads(file.read(MAX_BYTES))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"job folder {folder}: {STATE} cannot be read ({error}); expected the folder that "
            "launch/run.py named when it started"
        ) from None
    return found


def alive(state: dict[str, Any]) -> bool:
    """Whether the launcher still runs; of another machine's, whether it has not ended."""
    if state["exit_code"] is not None:
        return False
    if state["host"] != socket.gethostname():
        return True
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(state["pid"])
        same = abs(process.create_time() - state["created"]) < 1
        return same and process.status() != psutil.STATUS_ZOMBIE
    return False


def stop(folder: Path) -> None:
    """Asks the launcher to end its job with a checkpoint.

    Raises:
        ConfigError: it does not run, or not on this machine.
    """
    state = read(folder)
    if state["host"] != socket.gethostname():
        raise ConfigError(f"the launcher runs on {state['host']}; run this there")
    if not alive(state):
        raise ConfigError(f"the launcher of {folder} does not run any more")
    os.kill(state["pid"], signal.SIGTERM)


def detach(argv: Sequence[str], folder: Path) -> int:
    """Starts a launcher in a session of its own, which no terminal ends.

    Args:
        argv: of the launcher.

    Returns:
        Its pid.

    Raises:
        ConfigError: it did not take hold of the folder; why stands in its output.
    """
    with held(folder):  # refuses in time, and leaves it to the other one
        (folder / STATE).unlink(missing_ok=True)
    path = folder / OUTPUT
    with path.open("wb") as output:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # its lines in the order in which they were said
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    deadline = time.monotonic() + DETACH_S
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / STATE).exists():
            return process.pid
        time.sleep(0.05)
    process.kill()  # or it would come up after all
    process.wait()
    said = path.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
    raise ConfigError(f"the launcher did not start: {said or 'it said nothing'}")
