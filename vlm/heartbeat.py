"""What a rank does right now, in a small file that its host's agent looks at.

A launcher that wants to know sets ``SACCADE_BEAT`` to the file's path; without it nothing is
written. Not here: what to think of a rank that falls silent (``vlm.nodes.launcher.hang``).
"""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

BEAT_FILE = "SACCADE_BEAT"
#: bytes of a beat: one write of the same length each time, so that a reader finds it whole
SIZE = 1024
#: shards that are named
MAX_SHARDS = 3
MAX_NAME = 200


class Beat(NamedTuple):
    """``step`` is the one that ``phase`` belongs to; ``time`` is the host's clock."""

    phase: str
    step: int
    time: float
    shards: tuple[str, ...] = ()


class Heartbeat:
    """Where a training process says what it does; a no-op where nobody listens."""

    def __init__(self) -> None:
        path = os.environ.get(BEAT_FILE)
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        self._file = None if path is None else os.open(path, flags, 0o600)

    @property
    def heard(self) -> bool:
        return self._file is not None

    def beat(self, phase: str, step: int, shards: Sequence[str] = ()) -> None:
        if self._file is None:
            return
        named = [shard[-MAX_NAME:] for shard in shards[:MAX_SHARDS]]
        now = time.time()
        # a name in other letters takes six bytes for each: what does not fit is not named
        while len(text := json.dumps([phase, step, now, named])) >= SIZE:
            named.pop()
        os.pwrite(self._file, text.encode().ljust(SIZE - 1) + b"\n", 0)


def read(path: Path) -> Beat | None:
    """The last beat of a rank; None before the first, or while it is being written."""
    try:
        phase, step, when, shards = json.loads(path.read_bytes()[:SIZE])
        return Beat(str(phase), int(step), float(when), tuple(str(s) for s in shards))
    except (OSError, ValueError, TypeError):
        return None
