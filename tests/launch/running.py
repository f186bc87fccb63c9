"""launch/run.py as it is started by hand, on nodes that are real to ssh."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nodes import sshd
from tests.nodes.sshd import Nodes
from tests.train import helpers
from vlm.nodes.hostfile import to_text

ROOT = Path(__file__).parents[2]
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
    port = sshd.free_port("127.0.0.2")
    return [*found, "--master-port", port, "--min-free-gb", "0.01", *more]


def training(folder: Path, *overrides: str) -> list[object]:
    command = ["--", ROOT / "launch/train.py", "--ds_config", helpers.ds_file(2)]
    recipe = ["--recipe", helpers.world() / "recipe.yaml", f"output_dir={folder}/run"]
    return [*command, *recipe, *overrides]


def state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run/launch/state.json").read_text())
