"""Processes of a job on this host, found by a mark in their environment, and their end.

The mark is a random word of the job and the host's name, which every process of the job inherits;
no process is ever chosen by what it is called. Not here: who asks for it
(``vlm.nodes.agent.agent``).
"""

import contextlib
import os
import signal
import time
from collections.abc import Sequence

import psutil

from vlm.errors import EXIT_FAULTS, command

MARK = "SACCADE_JOB"
PATIENCE_S, LOOK_S = 10.0, 0.1


def marked(mark: str) -> list[psutil.Process]:
    """Processes that run with this mark, without this one. Zombies have ended."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(process)
    return found


def kill(mark: str) -> list[int]:
    """Kills them and their process groups, and waits until they are gone.

    Returns:
        Pids of those that are still there: stuck in the kernel, where no signal reaches.
    """
    stop = time.monotonic() + PATIENCE_S
    while (found := marked(mark)) and time.monotonic() < stop:
        for process in found:
            _kill(process)
        time.sleep(LOOK_S)  # not psutil.wait_procs: it takes the exit codes of children
    return [process.pid for process in found]


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.Error, ProcessLookupError):
        if os.getpgid(process.pid) == process.pid:  # all that it has started, too
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()


def main(argv: Sequence[str]) -> int:
    """Ends what carries this process's own mark; 1 where something cannot be ended."""
    return EXIT_FAULTS if kill(os.environ[MARK]) else 0


if __name__ == "__main__":
    command(main)()
