"""Everything that goes wrong on real nodes, done to real training: make test-slow.

Nodes are ssh servers on loopback addresses, so that the machine has to be killed with care: what is
chosen is always a process of this test's own job.
"""

import contextlib
import dataclasses
import functools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from tests.launch.faults import FREEZE_HOST, KILL_AGENT, KILL_RANK, STOP_RANK, Faults
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
    state,
    training,
)
from tests.nodes import sshd
from tests.nodes.sshd import Node, Nodes
from tests.ports import free_port
from tests.system import require
from tests.train import helpers
from vlm.nodes.hosts.hostfile import to_text
from vlm.nodes.hosts.verdict import MIN_SHM

__all__ = ["nobody_stays", "nodes"]  # fixtures
pytestmark = pytest.mark.slow

STEPS = 40
LONG = (f"train.steps={STEPS}", "train.checkpoint_every=4", "train.eval_every=20")
#: longer than any test, and without an end of its own
ENDLESS = ("train.steps=100000", "train.checkpoint_every=20", "train.eval_every=100000")
#: nvidia-smi of a node
SMI = """#!/bin/sh
case "$1" in
--query-gpu=*) printf '%s\\n' {lines}; exit {code};;
esac
"""
GPUS = [f"{index}, GPU-{index}, NVIDIA A100-SXM4-80GB, 81920, 4, 0" for index in (0, 1)]
DIE = "raise RuntimeError('CUDA error: uncorrectable ECC error encountered')"
LOST = "Unable to determine the device handle for GPU 0000:41:00.0: GPU is lost"


@functools.cache
def undisturbed() -> Path:
    """The whole run, by the same command on this machine alone, without ssh: what others equal."""
    folder = Path(tempfile.mkdtemp(dir=helpers.world()))
    (folder / "hostfile").write_text("localhost slots=2\n")
    given = ["--hostfile", folder / "hostfile", "--quick", "--min-free-gb", "0.01"]
    port = free_port()
    finish(launcher(*given, "--master-port", port, *training(folder, *LONG)))
    return folder


def test_one_machine_by_the_same_command() -> None:
    folder = undisturbed()
    assert max(row["step"] for row in exact(folder)) == STEPS
    assert state(folder)["hosts"]["localhost"]["ranks"] == 2
    nothing_left(folder)


def test_a_rank_an_agent_and_a_frozen_rank(nodes: Nodes, tmp_path: Path) -> None:
    """Three failures one after another; the job goes on each time, and losses are the same."""
    faults = Faults(tmp_path)
    faults.at(1, 9, KILL_RANK)
    faults.at(1, 18, KILL_AGENT)
    faults.at(0, 30, STOP_RANK)
    given = options(nodes, tmp_path, "--hang-s", 40, "--grace-s", 20, *faults.options)
    started = launcher(*given, *training(tmp_path, *LONG))
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


def test_a_host_that_freezes(nodes: Nodes, tmp_path: Path) -> None:
    """Agent and rank; ssh still answers, so that what is left there can be ended."""
    faults = Faults(tmp_path)
    faults.at(1, 9, FREEZE_HOST)
    given = options(nodes, tmp_path, "--grace-s", 20, *faults.options)
    output = finish(launcher(*given, *training(tmp_path, *LONG)))
    assert "first failure: host 127.0.0.3: nothing was heard for 60 s" in output
    assert "127.0.0.3: nothing is left there" in output
    assert exact(tmp_path) == exact(undisturbed())
    nothing_left(tmp_path)


def test_the_launcher_is_stopped_then_killed(nodes: Nodes, tmp_path: Path) -> None:
    """Detached, followed, stopped with a checkpoint; then killed, and nothing stays behind."""
    faults = Faults(tmp_path)
    faults.slow(True)
    given = options(nodes, tmp_path, "--grace-s", 20, *faults.options)
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
    at_step(tmp_path, 20)
    started.kill()
    started.wait()
    nothing_left(tmp_path)
    faults.slow(False)
    finish(launcher(*given, *training(tmp_path, *LONG)))
    assert exact(tmp_path) == exact(undisturbed())


def test_sigterm_to_the_launcher(nodes: Nodes, tmp_path: Path) -> None:
    started = launcher(*options(nodes, tmp_path), *training(tmp_path, *ENDLESS))
    at_step(tmp_path, 9)
    started.terminate()
    assert "stopping at the next step: SIGTERM" in (
        finish(started, 75) + (tmp_path / "run/launch/timeline.log").read_text()
    )
    nothing_left(tmp_path)


SAVES = """
import signal, sys, time
from vlm.heartbeat import Heartbeat
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
Heartbeat().beat("train", 1)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_other_signals_end_any_script_as_well(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "saves.py").write_text(SAVES)
    (tmp_path / "hostfile").write_text("localhost slots=1\n")
    given = ["--hostfile", tmp_path / "hostfile", "--quick", "--min-free-gb", "0.01"]
    given += ["--master-port", free_port(), "--job", tmp_path / "run/launch"]
    started = launcher(*given, "--", tmp_path / "saves.py")
    at_step(tmp_path, 1)
    started.send_signal(number)
    assert "code 75: stopped as asked" in finish(started, 75)
    nothing_left(tmp_path)


def test_a_node_goes_down_and_comes_back(tmp_path: Path) -> None:
    """On one node with the same samples, until the other one is there again."""
    with sshd.nodes(tmp_path / "ssh", 2) as own:
        given = options(own, tmp_path, "--grace-s", 25)
        started = launcher(*given, *training(tmp_path, *ENDLESS))
        at_step(tmp_path, 30)
        server = own.nodes[1].server
        connections = psutil.Process(server.pid).children(recursive=True)
        own.nodes[1].stop()
        for process in connections:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name().startswith("sshd"):
                    process.kill()
        alone = at_step(tmp_path, 40, attempt=2)
        assert alone["hosts"]["127.0.0.3"]["state"] == "not used" and len(alone["ranks"]) == 1
        again = subprocess.Popen(server.args, start_new_session=True)  # type: ignore[arg-type]
        try:
            back = at_step(tmp_path, STEPS + 1, attempt=3)
            assert len(back["ranks"]) == 2
            started.terminate()
            output = finish(started, 75)
        finally:
            os.killpg(again.pid, signal.SIGKILL)
            again.wait()
    assert "127.0.0.3: cannot be looked at" in output and "127.0.0.3 is back" in output
    same_samples(tmp_path)
    nothing_left(tmp_path)


def same_samples(folder: Path) -> None:
    """Each step has trained once, on what the undisturbed run trains on there."""
    rows = [row for row in exact(folder) if row["event"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    whole = [row for row in exact(undisturbed()) if row["event"] == "train"]
    assert len(rows) > len(whole)
    for found, row in zip(rows, whole, strict=False):
        for column in ("step", "samples_seen", "tokens_seen"):
            assert found[column] == row[column]


def smi(node: Node, lines: list[str], code: int = 0) -> Path:
    """A program that says this, not yet under the name of nvidia-smi."""
    aside = node.programs / "aside"
    aside.write_text(SMI.format(lines=shlex.join(lines), code=code))
    aside.chmod(0o755)
    return aside


def with_gpus(node: Node, lines: list[str]) -> None:
    """What the node's nvidia-smi says from now on."""
    smi(node, lines).replace(node.programs / "nvidia-smi")


def test_a_gpu_dies_and_comes_back(tmp_path: Path) -> None:
    """Ranks compute on the CPU, but the launcher holds them for users of what nvidia-smi lists."""
    if shutil.disk_usage("/dev/shm").total < MIN_SHM:
        pytest.skip("/dev/shm is smaller than any host with GPUs may have it")
    faults = Faults(tmp_path)
    with sshd.nodes(tmp_path / "ssh", 2) as own:
        first, second = own.nodes
        second = dataclasses.replace(second, host=dataclasses.replace(second.host, slots=2))
        own.nodes[1] = second
        with_gpus(first, GPUS[:1])
        with_gpus(second, GPUS)
        lost = smi(second, [GPUS[0], LOST], code=15)
        faults.at(1, 30, f"os.replace({str(lost)!r}, {str(lost.with_name('nvidia-smi'))!r}); {DIE}")
        given = options(own, tmp_path, "--grace-s", 25, "--env", "DS_ACCELERATOR=cpu")
        given += faults.options
        started = launcher(*given, *training(tmp_path, *ENDLESS), DS_ACCELERATOR="cuda")
        alone = at_step(tmp_path, 40, attempt=2)
        assert alone["hosts"]["127.0.0.3"]["state"] == "not used" and len(alone["ranks"]) == 1
        with_gpus(second, GPUS)
        back = at_step(tmp_path, STEPS + 1, attempt=3)
        assert len(back["ranks"]) == 2 and back["num_failures"] == 1
        started.terminate()
        output = finish(started, 75)
    assert "first failure: rank 1 on 127.0.0.3: ended with code 1" in output
    assert "RuntimeError: CUDA error: uncorrectable ECC error" in output
    assert f"FAIL 127.0.0.3 1 GPUs for 2 slots (nvidia-smi: {LOST})" in output
    assert "127.0.0.3 is back: saving, to go on with more ranks" in output
    same_samples(tmp_path)
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
        faults = Faults(tmp_path)
        faults.slow(True)
        given = options(nodes, tmp_path, "--min-free-gb", "0.0001", "--max-restarts", 1)
        given += faults.options
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
        faults.slow(False)
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
    command += ["--master_port", str(free_port())]
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
