"""What runs on each host of a job: torch's elastic agent, and a line to the launcher.

Started over ssh. Standard input brings one JSON object a line: first the request, then commands
and signs of life; standard output takes events. When the input ends or falls silent, the launcher
is gone, and so is everything here: ranks are told to stop, given time, and killed.

Not here: the launcher's side (``vlm.nodes.launcher.supervise``), what is told of ranks
(``vlm.nodes.agent.watch``).
"""

import json
import os
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, launch_agent

from vlm.errors import EXIT_FAULTS, command
from vlm.nodes.agent import leftovers
from vlm.nodes.agent.environment import for_ranks
from vlm.nodes.agent.watch import CHUNK, Events, Ranks, Watch

#: between looks at what ends
LOOK_S = 0.1
#: between torch's looks at ranks; seldom, for whoever looks first learns how one has ended
MONITOR_S = 1.0
#: for torch to notice that all ranks have ended, and to say so
SAY_S = 5.0
#: for all hosts to come to the first
MEET_S = 300


@dataclass(frozen=True)
class Request:
    """What the launcher asks of a host.

    Attributes:
        mark: of every process of this job on this host.
        argv: of each rank: the script and its arguments.
        env: added to what the host has.
        logs: folder for a log of each rank.
        grace_s: between being told to stop and being killed.
        silence_s: without a sign of the launcher until it counts as gone.
    """

    run_id: str
    mark: str
    num_nodes: int
    node_rank: int
    first_rank: int
    num_local_ranks: int
    master_addr: str
    master_port: int
    python: str
    argv: tuple[str, ...]
    env: dict[str, str]
    logs: str
    grace_s: float
    silence_s: float

    @property
    def local(self) -> Path:
        """Folder on this host for what no other host needs."""
        return Path(tempfile.gettempdir(), f"saccade-{self.mark.replace('/', '-')}")


def run(request: Request) -> dict[int, int]:
    """Runs this host's ranks to their end. From the main thread: torch handles signals there.

    Returns:
        Exit code by local rank of those that failed first; empty: none did.
    """
    config = LaunchConfig(
        min_nodes=request.num_nodes,
        max_nodes=request.num_nodes,
        nproc_per_node=request.num_local_ranks,
        run_id=request.run_id,
        rdzv_backend="static",
        rdzv_endpoint=f"{request.master_addr}:{request.master_port}",
        rdzv_configs={"rank": request.node_rank, "timeout": MEET_S},
        max_restarts=0,
        monitor_interval=MONITOR_S,
        logs_specs=DefaultLogsSpecs(log_dir=str(request.local / "torch")),
        shutdown_timeout=max(1, int(request.grace_s)),
    )
    argv = ["-m", "vlm.nodes.agent.rank", request.logs, str(request.local), *request.argv]
    try:
        launch_agent(config, request.python, argv)
    except ChildFailedError as error:
        return {found.local_rank: found.exitcode for found in error.failures.values()}
    return {}


def obey(request: Request, ranks: Ranks, watch: Watch) -> None:
    """Carries out commands until one says to stop, or the launcher is gone; ends this process."""
    for line in _lines(sys.stdin.fileno(), request.silence_s):
        asked = json.loads(line)
        if asked.get("stacks"):
            watch.tell_stacks()
        if "stop" in asked:
            end(request, ranks, watch, asked["stop"])
    end(request, ranks, watch, request.grace_s)


def _lines(descriptor: int, silence_s: float) -> Iterator[bytes]:
    rest = b""
    while select.select([descriptor], [], [], silence_s)[0]:
        data = os.read(descriptor, CHUNK)
        if not data:
            return
        *whole, rest = (rest + data).split(b"\n")
        yield from whole


def end(request: Request, ranks: Ranks, watch: Watch, grace_s: float) -> None:
    """Leaves no process behind, and does not come back.

    The main thread ends this process when all ranks have left by themselves.
    """
    ranks.signal(signal.SIGTERM)
    stop = time.monotonic() + grace_s
    while ranks.find() and time.monotonic() < stop:
        time.sleep(LOOK_S)
    leftovers.kill(request.mark)
    if ranks.seen:
        time.sleep(SAY_S)
    watch.tell_end({})
    clean(request)
    os._exit(EXIT_FAULTS)


def clean(request: Request) -> None:
    shutil.rmtree(request.local, ignore_errors=True)


def main(argv: Sequence[str]) -> int:
    # what others print must not get between the events
    events = Events(os.dup(1))
    os.dup2(2, 1)
    request = _request(_first_line(sys.stdin.fileno()))
    kept = for_ranks(os.environ, request.env)
    os.environ.clear()
    os.environ.update(kept, SACCADE_AGENT=str(os.getpid()))
    if request.num_local_ranks > 1:  # as torchrun does: ranks share the cores
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    # of an earlier attempt whose agent was killed, frozen or cut off
    if stuck := leftovers.kill(request.mark):
        events.send("fault", text=f"processes {stuck} of an earlier attempt cannot be killed")
        return EXIT_FAULTS
    Path(request.logs).mkdir(parents=True, exist_ok=True)
    request.local.mkdir(mode=0o700, exist_ok=True)
    ranks = Ranks()
    watch = Watch(
        ranks,
        Path(request.logs),
        request.local,
        request.first_rank,
        request.num_local_ranks,
        events,
    )
    for task in (
        lambda: obey(request, ranks, watch),
        watch.forever,
    ):
        threading.Thread(target=task, daemon=True).start()
    codes = run(request)
    leftovers.kill(request.mark)
    watch.tell_end(codes)
    clean(request)
    return EXIT_FAULTS if codes else 0


def _first_line(descriptor: int) -> bytes:
    """Byte by byte: what follows is for `obey`."""
    line = b""
    while (byte := os.read(descriptor, 1)) not in (b"", b"\n"):
        line += byte
    return line


def _request(line: bytes) -> Request:
    found = json.loads(line)
    assert found.keys() == {field.name for field in fields(Request)}, "another version's launcher"
    return Request(**{**found, "argv": tuple(found["argv"])})


if __name__ == "__main__":
    command(main)()
