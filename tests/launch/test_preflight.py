import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.nodes import sshd
from tests.ports import free_port
from tests.train import helpers
from vlm.nodes.hosts.hostfile import to_text

ROOT = Path(__file__).parents[2]


def run(*argv: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch/preflight.py"), *map(str, argv)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        timeout=300,
    )


@pytest.mark.slow
def test_two_hosts_and_a_recipe(tmp_path: Path) -> None:
    """All of it: facts, the meeting, then torchrun on both with an all-reduce."""
    with sshd.nodes(tmp_path / "ssh", 2) as nodes:
        hostfile = tmp_path / "hostfile"
        hostfile.write_text(to_text(nodes.hosts))
        port = free_port()
        options = ["--hostfile", hostfile, "--known-hosts", nodes.known_hosts]
        options += ["--master-port", port, "--min-free-gb", "0.1"]
        recipe = ["--recipe", helpers.world() / "recipe.yaml", f"output_dir={tmp_path}/run"]
        done = run(*options, *recipe, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        found = json.loads(done.stdout)
        assert found["all_reduce_gbit"] > 0
        for host in found["hosts"]:
            assert host["ok"] and host["gbit"] > 0 and len(host["tflops"]) == 1
            assert len(host["facts"]["manifests"]) == 2
        full = run(*options, "--quick", "--min-free-gb", "1e9")
        assert full.returncode == 1
        assert full.stdout.count("GB free, expected") >= 2 and full.stderr == ""
    gone = run("--hostfile", hostfile, "--known-hosts", nodes.known_hosts)
    assert gone.returncode == 1 and gone.stdout.count("FAIL  127.0.0.") == 2


def test_misuse(tmp_path: Path) -> None:
    done = run("--hostfile", tmp_path / "nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("error: hostfile ") and done.stderr.count("\n") == 1
