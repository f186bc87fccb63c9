"""Runs functions on several ranks: real processes, gloo, DeepSpeed as the launcher starts it.

``ranks(2).run(function, *arguments)`` gives each rank's result. A process takes seconds to import
what it needs, so one process imports it, all ranks are forked from that one, and a group of ranks
lives as long as the test session; an error or a timeout ends it, and the next use starts a fresh
one. ``Ranks(2)`` is a group of one's own,
for tests that need processes in which nothing has happened yet.
"""

import atexit
import functools
import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.ports import free_port

TIMEOUT_S = 300.0
#: for the other ranks, after one that raised or died
GRACE_S = 5.0
#: what the process imports that ranks are forked from
PRELOADED = [
    "deepspeed",
    "deepspeed.runtime.zero.muon.original_muon",  # and with it torch's compiler: three seconds
    "transformers",
    "vlm.train.loop",
]


class RankError(Exception):
    """A function raised on a rank, or did not return in time."""


class Ranks:
    """A process group of ``world_size`` processes, started when first used."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._logs: list[Path] = []
        self._folder: Path | None = None

    def run(self, function: Callable, *arguments: Any, timeout_s: float = TIMEOUT_S) -> list:
        """Calls ``function`` on all ranks at once; results in rank order.

        Raises:
            RankError: with the traceback of every rank that raised, or the output of one that hung.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments))
        return self._collect(time.monotonic() + timeout_s)

    def _collect(self, deadline: float) -> list:
        results: dict[int, Any] = {}
        faults: dict[int, str] = {}
        waited_for = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while waited_for:
            ready = connection.wait(list(waited_for), max(0.0, deadline - time.monotonic()))
            if not ready:
                for rank in waited_for.values():
                    faults[rank] = f"rank {rank} did not return; its output:\n{self._tail(rank)}"
                break
            for pipe in ready:
                rank = waited_for.pop(pipe)  # type: ignore[call-overload]
                try:
                    results[rank], fault = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    faults[rank] = f"rank {rank} died; its output:\n{self._tail(rank)}"
                else:
                    if fault is not None:
                        faults[rank] = f"rank {rank}:\n{fault}"
            if faults:  # the others may wait in vain for the one that is lost
                deadline = min(deadline, time.monotonic() + GRACE_S)
        if faults:
            self.close()
            raise RankError("\n".join(faults[rank] for rank in sorted(faults)))
        return [results[rank] for rank in range(self.world_size)]

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        port = free_port()
        folder = self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            log = folder / f"{rank}.log"
            process = context.Process(
                target=_serve, args=(rank, self.world_size, port, log, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
            self._logs.append(log)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        if self._folder is not None:
            shutil.rmtree(self._folder)
        self._processes, self._pipes, self._logs, self._folder = [], [], [], None

    def _tail(self, rank: int) -> str:
        return self._logs[rank].read_text(errors="replace")[-3000:]


@functools.cache
def ranks(world_size: int) -> Ranks:
    """The session's group of this size."""
    group = Ranks(world_size)
    atexit.register(group.close)
    return group


def _serve(rank: int, world_size: int, port: int, log: Path, pipe: Connection) -> None:
    """A rank: starts as launch/train.py does, then calls what it is sent."""
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # DeepSpeed would leave here what it compiles
        "TORCH_EXTENSIONS_DIR": str(log.with_suffix(".built")),
    }
    # here, so that the parent need not wait for DeepSpeed
    from vlm import log as vlm_log
    from vlm.engine.setup import start_process

    vlm_log.setup()
    start_process(cpu_threads=1)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer: tuple[Any, str | None] = function(*arguments), None
        except BaseException:
            answer = None, traceback.format_exc()
        pipe.send(answer)
