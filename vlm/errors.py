"""What can go wrong, by whose fault.

``UserError`` and its subclasses are the user's mistakes: a wrong path, key, shape or shard. They
reach the terminal as one line without a traceback and end the process with exit code 2. Anything
else is our bug, keeps its traceback and ends with 1. Not here: ``assert``, which marks what only
a bug of ours can break.
"""

import functools
import os
import sys
import time
from collections.abc import Callable, Sequence

EXIT_USER_ERROR = 2
EXIT_FAULTS = 1
#: stopped by a signal or a time limit with all work saved: start again with the same command
EXIT_PREEMPTED = 75
#: for which the other ranks let rank 0 speak first
PATIENCE_S = 10.0


class UserError(Exception):
    """A mistake the user can mend: what was found, what was expected, where, and what to do."""


class ConfigError(UserError):
    """A recipe or DeepSpeed file is wrong."""


class DataError(UserError):
    """A shard, manifest or annotation file is wrong."""


class SampleError(DataError):
    """One sample is wrong; the message names shard, key and member."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete or does not fit the run."""


class HealthError(UserError):
    """Training went wrong in a way that more of it does not mend."""


class TransientError(Exception):
    """The world failed, not the user: a file system that vanished, a peer that died."""


def one_line(said: BaseException | str) -> str:
    """An error or text as one line that can be printed (a name from a shard may hold anything)."""
    text = " ".join(str(said).split())
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def _whose() -> str:
    """Which rank speaks. Not the first one waits before: rank 0 mostly fails for the same reason,
    and its launcher ends the others when it has, so a mistake is one line, not one for each rank.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        return ""
    time.sleep(PATIENCE_S)
    return f"rank {rank}: "


def command(main: Callable[[Sequence[str]], int | None]) -> Callable[[], None]:
    """Turns ``main(argv) -> exit code`` into the entry point of a script."""

    @functools.wraps(main)
    def entry() -> None:
        try:
            code = main(sys.argv[1:])
        except UserError as error:
            sys.stderr.write(f"error: {_whose()}{one_line(error)}\n")
            sys.exit(EXIT_USER_ERROR)
        except KeyboardInterrupt:
            sys.stderr.write("interrupted\n")
            sys.exit(130)
        except BrokenPipeError:
            sys.stderr.close()
            sys.exit(141)
        sys.exit(code or 0)

    return entry
