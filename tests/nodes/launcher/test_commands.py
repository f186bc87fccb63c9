"""What is printed is run, by a shell, with programs that say how they were called."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlm.nodes.hosts.hostfile import Host
from vlm.nodes.launcher import commands
from vlm.nodes.launcher.connection import Job

HOSTS = [Host("node-0", 8, addr="10.0.0.1", iface="ens1"), Host("node-1", 8, port=2222)]
AWKWARD = ["<|image|> $HOME 'q' ; a", "*", "a b"]
SAY = f"""#!{sys.executable}
import json, os, sys
names = ("HF_TOKEN", "HF_HOME", "NCCL_SOCKET_IFNAME", "MASTER_ADDR")
print(json.dumps([sys.argv[1:], os.getcwd(), [os.environ.get(n) for n in names]]))
"""


@pytest.fixture
def job(tmp_path: Path) -> Job:
    folder = tmp_path / "it's here"
    folder.mkdir()
    for name in ("python", "deepspeed"):
        (tmp_path / name).write_text(SAY)
        (tmp_path / name).chmod(0o755)
    env = {"HF_TOKEN": "planted", "HF_HOME": "/a $b"}
    argv = ("train.py", *AWKWARD)
    python = str(tmp_path / "python")
    return Job("mark", argv, python, folder, Path("/logs"), env, 1.0, 1.0, 1.0)


def run(text: str, tmp_path: Path, **variables: str) -> list:
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", text],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": path, **variables},
    )
    return json.loads(done.stdout)


def test_torchrun(job: Job, tmp_path: Path) -> None:
    text = commands.torchrun(job, HOSTS, 29500)
    assert "planted" not in text
    first, second = text.split("# on node-1")
    argv, folder, env = run(first, tmp_path)
    assert argv[-4:] == ["train.py", *AWKWARD] and folder == str(job.folder)
    assert argv[2:7] == [
        *("--nnodes=2", "--node_rank=0", "--nproc_per_node=8"),
        *("--master_addr=10.0.0.1", "--master_port=29500"),
    ]
    assert env[:3] == [None, "/a $b", "ens1"]
    assert "--node_rank=1" in run(f"# {second}", tmp_path)[0]


def test_deepspeed(job: Job, tmp_path: Path) -> None:
    _, second = commands.deepspeed(job, HOSTS, 29500).split("# on node-1")
    argv = run(f"# {second}", tmp_path)[0]
    assert argv[:5] == ["--hostfile", "hostfile.plain", "--no_ssh", "--node_rank", "1"]
    assert argv[-4:] == ["train.py", *AWKWARD]
    plain = (job.folder / "hostfile.plain").read_text()
    assert plain == "node-0 slots=8\nnode-1 slots=8\n"


def test_sbatch(job: Job, tmp_path: Path) -> None:
    text = commands.sbatch(job, HOSTS, 29500)
    assert "planted" not in text and "#SBATCH --nodes=2\n" in text
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'gpu1\\ngpu2\\n'\n")
    (tmp_path / "srun").write_text('#!/bin/sh\nshift\nSLURM_NODEID=1 exec "$@"\n')
    for name in ("scontrol", "srun"):
        (tmp_path / name).chmod(0o755)
    argv, folder, env = run(text, tmp_path, SLURM_JOB_NODELIST="gpu[1-2]")
    assert argv[-4:] == ["train.py", *AWKWARD] and folder == str(job.folder)
    assert "--node_rank=1" in argv and "--master_addr=gpu1" in argv and env[3] == "gpu1"
