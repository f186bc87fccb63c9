"""An ssh connection to the agent of one host: what it is asked, and what it says.

Not here: what follows from it (``vlm.nodes.launcher.supervise``).
"""

import contextlib
import json
import queue
import subprocess
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vlm.errors import one_line
from vlm.nodes.agent.leftovers import MARK
from vlm.nodes.hosts import ssh
from vlm.nodes.hosts.hostfile import Host
from vlm.nodes.hosts.preflight import communication_env

#: lines of what a host says on stderr
NUM_SAID = 20
#: bytes of a line that a host sends
MAX_LINE = 2**22


@dataclass(frozen=True)
class Job:
    """What runs on every host.

    Attributes:
        mark: a random word that all processes of the job carry.
        argv: script and arguments of each rank.
        python: the interpreter on each host.
        folder: where training starts there.
        logs: folder on each host for a log of each rank.
        env: of each rank.
        grace_s: between being told to stop and being killed.
        silence_s: without a sign of life until a host counts as lost.
        hang_s: without a step, at least, until the job counts as hung.
    """

    mark: str
    argv: tuple[str, ...]
    python: str
    folder: Path
    logs: Path
    env: dict[str, str]
    grace_s: float
    silence_s: float
    hang_s: float
    known_hosts: Path | None = None


@dataclass(frozen=True)
class Place:
    """A host in an attempt."""

    host: Host
    #: its ranks in this attempt, at most its slots
    num_ranks: int
    #: where the others reach it
    address: str
    iface: str | None


def first_ranks(places: Sequence[Place]) -> list[int]:
    """The number in the job of each place's local rank 0."""
    return [sum(place.num_ranks for place in places[:index]) for index in range(len(places))]


class Connection:
    """Its threads put (index, event) into ``events``; the last one is ``closed``."""

    def __init__(
        self,
        job: Job,
        places: Sequence[Place],
        index: int,
        port: int,
        run_id: str,
        events: "queue.Queue[tuple[int, dict[str, Any]]]",
    ) -> None:
        self._index, self._events = index, events
        place, mark = places[index], f"{job.mark}/{places[index].host.name}"
        request = {
            "run_id": run_id,
            "mark": mark,
            "num_nodes": len(places),
            "node_rank": index,
            "first_rank": first_ranks(places)[index],
            "num_local_ranks": place.num_ranks,
            "master_addr": places[0].address,
            "master_port": port,
            "python": job.python,
            "argv": job.argv,
            "env": {**communication_env(place.iface), **job.env},
            "logs": str(job.logs),
            "grace_s": job.grace_s,
            "silence_s": job.silence_s,
        }
        self._process = subprocess.Popen(
            ssh.command(place.host, job.known_hosts),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the launcher, which passes it on
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._stdin: IO[bytes] = self._process.stdin
        self._said: deque[str] = deque(maxlen=NUM_SAID)
        errors = threading.Thread(target=self._drain, args=(self._process.stderr,), daemon=True)
        errors.start()
        reader = (self._process.stdout, errors)
        threading.Thread(target=self._read, args=reader, daemon=True).start()
        text = ssh.script([job.python, "-m", "vlm.nodes.agent.agent"], job.folder, {MARK: mark})
        self._write(text.encode() + json.dumps(request).encode() + b"\n")

    def send(self, value: dict[str, Any]) -> None:
        self._write(json.dumps(value).encode() + b"\n")

    def close(self) -> None:
        """Ends the agent's input."""
        with contextlib.suppress(OSError):
            self._stdin.close()

    def kill(self) -> None:
        self._process.kill()

    def _write(self, data: bytes) -> None:
        # a host that is gone is noticed by the end of what it says
        with contextlib.suppress(OSError, ValueError):
            self._stdin.write(data)
            self._stdin.flush()

    def _drain(self, errors: IO[bytes]) -> None:
        while line := errors.readline(MAX_LINE):
            self._said.append(line.decode("utf-8", "replace").rstrip())

    def _read(self, output: IO[bytes], errors: threading.Thread) -> None:
        while line := output.readline(MAX_LINE):
            with contextlib.suppress(ValueError):  # a login script that prints
                event = json.loads(line)
                if isinstance(event, dict) and "event" in event:
                    self._events.put((self._index, event))
        code = self._process.wait()
        errors.join()
        said = [line for line in self._said if line.strip()]
        reason = one_line(said[-1]) if said else "the connection was lost"
        if code != ssh.SSH_FAILED:
            reason = f"its agent ended with {code}: {reason}"
        closed = {"event": "closed", "reason": reason, "lines": said}
        self._events.put((self._index, closed))
