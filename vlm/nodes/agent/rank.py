"""What a rank runs in: a script of the job, with its output in a file of its own.

``python -m vlm.nodes.agent.rank LOGS LOCAL launch/train.py ...``, started by torch's elastic agent.
It ends with its agent, and SIGUSR2 makes it write the stacks of all its threads. Not here: the
agent (``vlm.nodes.agent.agent``).
"""

import ctypes
import faulthandler
import os
import runpy
import signal
import sys
from pathlib import Path

from vlm.heartbeat import BEAT_FILE

PR_SET_PDEATHSIG = 1
#: asks for stacks
STACKS = signal.SIGUSR2


def log_path(logs: Path, rank: int) -> Path:
    return logs / f"rank_{rank:05d}.log"


def stacks_path(local: Path, rank: int) -> Path:
    return local / f"stacks_{rank:05d}.txt"


def beat_path(local: Path, rank: int) -> Path:
    return local / f"beat_{rank:05d}.json"


def _end_with_parent(parent: int) -> None:
    """A killed agent takes its ranks along, whatever they do at that moment."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:  # it had ended before
        os.kill(os.getpid(), signal.SIGKILL)


def _redirect(path: Path) -> None:
    out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(out)
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace")


def main() -> None:
    logs, local, script = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    rank = int(os.environ["RANK"])
    _end_with_parent(int(os.environ["SACCADE_AGENT"]))
    _redirect(log_path(logs, rank))
    stacks = stacks_path(local, rank).open("w")
    faulthandler.register(STACKS, file=stacks, all_threads=True)
    faulthandler.enable()
    os.environ[BEAT_FILE] = str(beat_path(local, rank))
    # as `python script` would have it
    sys.argv, sys.path[0] = sys.argv[3:], str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
