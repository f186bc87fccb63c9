"""Everything that goes wrong on real nodes, done to real training: make test-slow.

Nodes are ssh servers on loopback addresses, so that the machine has to be killed with care: what is
chosen is always a process of this test's own job.
"""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from tests.launch.running import (
    PATIENCE_S,
    ROOT,
    at_step,
    exact,
    finish,
    launcher,
    nobody_stays,
    nodes,
    nothing_left,
    options,
    pid_of,
    state,
    training,
)
from tests.nodes import sshd
from tests.nodes.sshd import Nodes
from tests.system import require
from tests.train import helpers
from vlm.nodes.hostfile import to_text

__all__ = ["nobody_stays", "nodes"]  # fixtures
pytestmark = pytest.mark.slow

STEPS = 80
LONG = (f"train.steps={STEPS}", "train.checkpoint_every=4", "train.eval_every=40")


@functools.cache
def undisturbed() -> Path:
    """The whole run, by the same command on this machine alone, without ssh: what others equal."""
    folder = Path(tempfile.mkdtemp(dir=helpers.world()))
    (folder / "hostfile").write_text("localhost slots=2\n")
    given = ["--hostfile", folder / "hostfile", "--quick", "--min-free-gb", "0.01"]
    port = sshd.free_port("127.0.0.1")
    started = launcher(*given, "--master-port", port, *training(folder, *LONG))
    output = started.communicate(timeout=PATIENCE_S)[0]
    assert started.returncode == 0, output
    return folder


def test_one_machine_by_the_same_command() -> None:
    folder = undisturbed()
    assert max(row["step"] for row in exact(folder)) == STEPS
    assert state(folder)["hosts"]["localhost"]["ranks"] == 2
    nothing_left(folder)


def test_a_rank_an_agent_and_a_frozen_rank(nodes: Nodes, tmp_path: Path) -> None:
    """Three failures one after another; the job goes on each time, and losses are the same."""
    given = options(nodes, tmp_path, "--hang-s", 40, "--grace-s", 20)
    started = launcher(*given, *training(tmp_path, *LONG))
    at_step(tmp_path, 9)
    os.kill(pid_of(tmp_path, 1), signal.SIGKILL)
    at_step(tmp_path, 20, attempt=2)
    agent = psutil.Process(pid_of(tmp_path, 1)).parent()
    assert agent is not None
    agent.kill()
    at_step(tmp_path, 50, attempt=3)
    os.kill(pid_of(tmp_path, 0), signal.SIGSTOP)
    output = finish(started)
    assert "first failure: rank 1 on 127.0.0.3: was killed by SIGKILL" in output
    assert "first failure: host 127.0.0.3" in output and "nothing is left there" in output
    assert "first failure: rank 0 on 127.0.0.2: no step for" in output
    assert "its process is stopped" in output and "with samples of" in output
    stacks = tmp_path / "run/launch/stacks/attempt_003"
    assert "process: stopped" in (stacks / "rank_00000.txt").read_text()
    assert "loop.py" in (stacks / "rank_00001.txt").read_text()
    assert state(tmp_path)["num_failures"] == 3
    assert exact(tmp_path) == exact(undisturbed())
    nothing_left(tmp_path)


def test_the_launcher_is_stopped_then_killed(nodes: Nodes, tmp_path: Path) -> None:
    """Detached, followed, stopped with a checkpoint; then killed, and nothing stays behind."""
    given = options(nodes, tmp_path, "--grace-s", 20)
    finish(launcher(*given, "--detach", *training(tmp_path, *LONG)))
    script = [sys.executable, ROOT / "launch/status.py", tmp_path / "run/launch"]
    follow = subprocess.Popen([*script, "--follow"], stdout=subprocess.PIPE, text=True)
    at_step(tmp_path, 9)
    subprocess.run([*script, "--stop"], check=True, capture_output=True, timeout=60)
    output = follow.communicate(timeout=PATIENCE_S)[0]
    assert follow.returncode == 75 and "code 75: stopped as asked" in output
    saved = (tmp_path / "run/checkpoints/latest").read_text()
    assert max(row["step"] for row in exact(tmp_path)) == int(saved.removeprefix("step_"))
    nothing_left(tmp_path)

    started = launcher(*given, *training(tmp_path, *LONG))
    at_step(tmp_path, 30)
    started.kill()
    started.wait()
    nothing_left(tmp_path)
    finish(launcher(*given, *training(tmp_path, *LONG)))
    assert exact(tmp_path) == exact(undisturbed())


def test_sigterm_to_the_launcher(nodes: Nodes, tmp_path: Path) -> None:
    started = launcher(*options(nodes, tmp_path), *training(tmp_path, *LONG))
    at_step(tmp_path, 9)
    started.terminate()
    assert "stopping at the next step: SIGTERM" in (
        finish(started, 75) + (tmp_path / "run/launch/timeline.log").read_text()
    )
    nothing_left(tmp_path)


def test_a_node_goes_down_and_comes_back(tmp_path: Path) -> None:
    """On one node with the same samples, until the other one is there again."""
    many = ("train.steps=100000", "train.checkpoint_every=50", "train.eval_every=100000")
    with sshd.nodes(tmp_path / "ssh", 2) as own:
        given = options(own, tmp_path, "--grace-s", 25)
        started = launcher(*given, *training(tmp_path, *many))
        at_step(tmp_path, 60)
        server = own.nodes[1].server
        connections = psutil.Process(server.pid).children(recursive=True)
        own.nodes[1].stop()
        for process in connections:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name().startswith("sshd"):
                    process.kill()
        alone = at_step(tmp_path, 60, attempt=2)
        assert alone["hosts"]["127.0.0.3"]["state"] == "not used" and len(alone["ranks"]) == 1
        again = subprocess.Popen(server.args, start_new_session=True)  # type: ignore[arg-type]
        try:
            back = at_step(tmp_path, 60, attempt=3)
            assert len(back["ranks"]) == 2
            started.terminate()
            output = finish(started, 75)
        finally:
            os.killpg(again.pid, signal.SIGKILL)
            again.wait()
    assert "127.0.0.3: cannot be looked at" in output and "127.0.0.3 is back" in output
    seen = {row["step"]: row for row in exact(tmp_path) if row["event"] == "train"}
    for row in exact(undisturbed()):
        if row["event"] == "train":
            found = seen[row["step"]]
            assert found["samples_seen"] == row["samples_seen"]
            assert found["tokens_seen"] == row["tokens_seen"]
    nothing_left(tmp_path)


def test_a_full_disk(nodes: Nodes, tmp_path: Path) -> None:
    """Never a false 0: saving fails, the job says so and ends; with space again it goes on."""
    run = tmp_path / "run"
    run.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", run], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("no tmpfs can be mounted here")
    try:
        given = options(nodes, tmp_path, "--min-free-gb", "0.0001", "--max-restarts", 1)
        started = launcher(*given, *training(tmp_path, *LONG))
        at_step(tmp_path, 9)
        with contextlib.suppress(OSError), (run / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(2**16))
        output = started.communicate(timeout=PATIENCE_S)[0]
        assert started.returncode not in (0, 75), output
        assert "No space left" in output or "GB free" in output, output
        nothing_left(tmp_path)
        (run / "filler").unlink()
        finish(launcher(*given, *training(tmp_path, *LONG)))
        assert exact(tmp_path) == exact(undisturbed())
    finally:
        subprocess.run(["umount", "-l", run], check=True)


def test_plain_torchrun_as_printed(nodes: Nodes, tmp_path: Path) -> None:
    """What --print shows for each host, run there by hand."""
    printed = finish(launcher(*options(nodes, tmp_path), "--print", *training(tmp_path, *LONG)))
    torchrun = printed.split("### ")[1].split("# on ")[1:]
    running = [
        subprocess.Popen(
            ["bash", "-c", f"# {text}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for text in torchrun
    ]
    for process in running:
        output = process.communicate(timeout=PATIENCE_S)[0]
        assert process.returncode == 0, output.decode()
    assert exact(tmp_path) == exact(undisturbed())


def test_stock_deepspeed_with_a_hostfile(nodes: Nodes, tmp_path: Path) -> None:
    """DeepSpeed reads our hostfile as it is; what it does not export goes through its env file."""
    require("pdsh")
    (tmp_path / "hostfile").write_text(to_text(nodes.hosts))
    (tmp_path / "env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    host = nodes.hosts[0]
    ssh = f"-i {host.key} -p {host.port} -o UserKnownHostsFile={nodes.known_hosts}"
    command = [Path(sys.executable).with_name("deepspeed"), "--hostfile", tmp_path / "hostfile"]
    command += ["--no_ssh_check", "--master_addr", "127.0.0.2"]
    command += ["--master_port", str(sshd.free_port("127.0.0.2"))]
    done = subprocess.run(
        [*command, *map(str, training(tmp_path, *LONG)[1:])],
        cwd=ROOT,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PDSH_SSH_ARGS_APPEND": f"{ssh} -o StrictHostKeyChecking=accept-new",
            "DS_ENV_FILE": str(tmp_path / "env"),
            "DS_ACCELERATOR": "cpu",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stdout.decode()
    assert exact(tmp_path) == exact(undisturbed())
