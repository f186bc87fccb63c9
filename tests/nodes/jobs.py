"""Attempts on real ssh servers whose ranks are small programs that meet nobody."""

import contextlib
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import psutil

from tests.nodes.sshd import Nodes
from tests.ports import free_port
from tests.waiting import wait_for
from vlm.nodes.launcher.connection import Job, Place
from vlm.nodes.launcher.outcome import Outcome
from vlm.nodes.launcher.supervise import Attempt

ROOT = Path(__file__).parents[2]
AWKWARD = ["<|image|> $HOME 'q' ; a", "", "*", "é"]
SECRET = "s3cret $(id) 'x'"
#: says who it is, does what is meant for its rank, else waits
PROGRAM = """
import json, os, signal, subprocess, sys, time
from vlm.heartbeat import Heartbeat
folder, codes, wait = sys.argv[1], json.loads(sys.argv[2]), float(sys.argv[3])
rank = int(os.environ["RANK"])
if "stubborn" in codes:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
elif "saves" in codes:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
if "children" in codes:
    child = subprocess.Popen(["sleep", "600"])
    open(os.path.join(folder, f"pid_child_{rank}"), "w").write(str(child.pid))
print("rank", rank, "says", json.dumps(sys.argv[4:]), os.environ.get("A_SECRET"), flush=True)
print(os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"], os.environ.get("HOST_API_KEY"))
# last: who reads it may do with this process whatever it likes
open(os.path.join(folder, f"pid_{rank}"), "w").write(str(os.getpid()))
code = codes.get(str(rank))
beats = codes.get("beats", 0)
for step in range(beats - (1 if code == "behind" else 0)):
    Heartbeat().beat("train", step, ["/data/a.tar"])
    time.sleep(0.1)
if code is None or code == "behind":
    time.sleep(wait)
elif code < 0:
    os.kill(os.getpid(), -code)
else:
    sys.exit(code)
"""


class Started:
    """An attempt with two ranks on each host, and what was heard of it."""

    def __init__(
        self, nodes: Nodes, folder: Path, codes: dict[str, Any], wait_s: float, **job: Any
    ) -> None:
        program = folder / "program.py"
        program.write_text(PROGRAM)
        self.folder, self.num_ranks = folder, 2 * len(nodes.hosts)
        self.events: list[tuple[int, dict[str, Any]]] = []
        argv = [str(program), str(folder), json.dumps(codes), str(wait_s), *AWKWARD]
        given = {"grace_s": 3.0, "silence_s": 60.0, "hang_s": 600.0, **job}
        made = Job(
            # the same for another attempt here, another one for whoever runs this test as well
            mark=hashlib.sha256(str(folder).encode()).hexdigest()[:16],
            argv=tuple(argv),
            python=sys.executable,
            folder=ROOT,
            logs=folder / "logs",
            env={"A_SECRET": SECRET},
            known_hosts=nodes.known_hosts,
            **given,
        )
        places = [Place(host, 2, host.name, "lo") for host in nodes.hosts]
        port = free_port()
        self.attempt = Attempt(made, places, port, "test", self._hear)

    def _hear(self, index: int, event: dict[str, Any]) -> None:
        self.events.append((index, event))

    def wait_for_ranks(self) -> None:
        def ready() -> bool:
            found = list(self.folder.glob("pid_?"))
            return len(found) == self.num_ranks and all(pids(self.folder))

        wait_for(ready)

    def wait_for_beats(self) -> None:
        """Until something was heard of what each rank does."""

        def heard() -> set[int]:
            return {event["rank"] for _, event in self.events if event["event"] == "beat"}

        wait_for(lambda: len(heard()) == self.num_ranks)

    def wait(self) -> Outcome:
        outcome = self.attempt.wait()
        assert not [pid for pid in pids(self.folder) if lives(pid)]
        return outcome


def pids(folder: Path) -> list[int]:
    """Of all processes that programs there have started and those of it; 0: not yet written."""
    return [int(path.read_text() or 0) for path in folder.glob("pid_*")]


def lives(pid: int) -> bool:
    """Whether it still runs; one that nobody has asked for its exit code does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
