"""launch/run.py as it is started by hand, on nodes that are real to ssh."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.nodes import sshd
from tests.nodes.sshd import Nodes
from tests.ports import free_port
from tests.train import helpers
from tests.waiting import wait_for
from vlm.nodes.hosts.hostfile import to_text
from vlm.train.metrics import read_rows

ROOT = Path(__file__).parents[2]
#: for a job with all its restarts, on a machine that is busy with other things
PATIENCE_S = 1200.0
#: columns that must not differ between a run that was disturbed and one that was not
EXACT = ("event", "step", "epoch", "samples_seen", "tokens_seen", "grad_norm", "loss", "eval_loss")
STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with sshd.nodes(tmp_path_factory.mktemp("nodes") / "ssh", 2) as started:
        yield started


@pytest.fixture(autouse=True)
def nobody_stays() -> Iterator[None]:
    """A test that fails leaves no launcher behind, and with it no ranks."""
    yield
    while STARTED:
        started = STARTED.pop()
        started.kill()
        started.wait()


def launcher(*argv: object, **variables: str) -> subprocess.Popen[str]:
    started = subprocess.Popen(
        [sys.executable, str(ROOT / "launch/run.py"), *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **variables},
    )
    STARTED.append(started)
    return started


def options(nodes: Nodes, folder: Path, *more: object) -> list[object]:
    hostfile = folder / "hostfile"
    hostfile.write_text(to_text(nodes.hosts))
    found = ["--hostfile", hostfile, "--known-hosts", nodes.known_hosts, "--quick"]
    port = free_port()
    return [*found, "--master-port", port, "--min-free-gb", "0.01", *more]


def training(folder: Path, *overrides: str) -> list[object]:
    command = ["--", ROOT / "launch/train.py", "--ds_config", helpers.ds_file(2)]
    recipe = ["--recipe", helpers.world() / "recipe.yaml", f"output_dir={folder}/run"]
    return [*command, *recipe, *overrides]


def state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run/launch/state.json").read_text())


def read_state(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return state(folder)
    return {"ranks": {}, "attempt": 0, "hosts": {}, "phase": ""}


def at_step(folder: Path, step: int, attempt: int = 1) -> dict[str, Any]:
    """Waits until all ranks have come to a step of an attempt."""

    def there() -> dict[str, Any] | None:
        found = read_state(folder)
        steps = [rank.get("step", 0) for rank in found["ranks"].values()]
        return found if found["attempt"] == attempt and steps and min(steps) >= step else None

    return wait_for(there, PATIENCE_S)


def processes(folder: Path) -> list[psutil.Process]:
    """Of the job in this folder, wherever they are."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and any(str(folder) in a for a in process.cmdline()):
                found.append(process)
    return found


def nothing_left(folder: Path) -> None:
    wait_for(lambda: not processes(folder))


def exact(folder: Path) -> list[dict[str, Any]]:
    rows = read_rows(folder / "run/metrics.jsonl")
    kept = [row for row in rows if row["event"] in ("train", "eval")]
    return [{k: v for k, v in row.items() if k.startswith(EXACT)} for row in kept]


def finish(started: subprocess.Popen[str], code: int = 0) -> str:
    output = started.communicate(timeout=PATIENCE_S)[0]
    assert started.returncode == code, output
    return output
