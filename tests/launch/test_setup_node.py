import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlm.nodes.agent import environment
from vlm.nodes.hosts import ssh

ROOT = Path(__file__).parents[2]
#: of a container
ENVIRON = {
    "HF_TOKEN": "planted-1 $(id) 'x'",
    "RUNPOD_API_KEY": "planted-2",
    "JUPYTER_PASSWORD": "planted-3",
    "PATH": "/nowhere",
    "NCCL_DEBUG": "INFO",
}


@pytest.fixture
def node(tmp_path: Path) -> dict[str, str]:
    for folder in ("home", "volume", "net/eth0", "net/ens1", "net/ens2", "rdma"):
        (tmp_path / folder).mkdir(parents=True)
    pairs = [f"{name}={value}" for name, value in ENVIRON.items()]
    (tmp_path / "environ").write_text("\0".join(pairs) + "\0")
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path / "home"),
        "SETUP_INSTALL": "0",
        "SETUP_ENVIRON": str(tmp_path / "environ"),
        "SETUP_NET": str(tmp_path / "net"),
        "SETUP_INFINIBAND": str(tmp_path / "rdma"),
    }


def setup(node: dict[str, str], volume: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "launch/setup_node.sh", str(volume)],
        cwd=ROOT,
        env=node,
        capture_output=True,
        text=True,
    )


def test_what_ranks_find_on_the_node(node: dict[str, str], tmp_path: Path) -> None:
    done = setup(node, tmp_path / "volume")
    assert done.returncode == 0, done.stderr
    assert "planted" not in done.stdout + done.stderr and "HF_TOKEN" in done.stdout
    file = tmp_path / "home/.saccade_env"
    assert file.stat().st_mode & 0o777 == 0o600
    text = ssh.script(
        [sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))"]
    )
    env = {"PATH": os.environ["PATH"], "HOME": node["HOME"]}
    shown = subprocess.run(["bash", "-s"], input=text, env=env, capture_output=True, text=True)
    found = json.loads(shown.stdout)
    assert found["HF_TOKEN"] == ENVIRON["HF_TOKEN"] and found["NCCL_DEBUG"] == "INFO"
    assert found["NCCL_SOCKET_IFNAME"] == found["GLOO_SOCKET_IFNAME"] == "ens1"
    assert found["NCCL_IB_DISABLE"] == "1"
    assert "RUNPOD_API_KEY" not in found and "JUPYTER_PASSWORD" not in found
    for name in ("HF_HOME", "TRITON_CACHE_DIR", "TMPDIR"):
        assert Path(found[name]).is_dir() and Path(found[name]).is_relative_to(tmp_path / "volume")


def test_again_changes_nothing(node: dict[str, str], tmp_path: Path) -> None:
    files = [tmp_path / "home" / name for name in (".saccade_env", ".bashrc")]
    setup(node, tmp_path / "volume")
    before = [path.read_text() for path in files]
    assert setup(node, tmp_path / "volume").returncode == 0
    assert [path.read_text() for path in files] == before and before[1].count("\n") == 1


def test_a_node_without_fabric_and_with_infiniband(node: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "net/ens2").rmdir()
    (tmp_path / "rdma/uverbs0").touch()
    setup(node, tmp_path / "volume")
    text = (tmp_path / "home/.saccade_env").read_text()
    assert "IFNAME" not in text and "IB_DISABLE" not in text


def test_no_volume(node: dict[str, str], tmp_path: Path) -> None:
    done = setup(node, tmp_path / "nowhere")
    assert done.returncode == 2 and done.stderr.startswith("error: found no folder")


def test_both_lists_agree() -> None:
    text = (ROOT / "launch/setup_node.sh").read_text()
    line = next(line for line in text.splitlines() if line.startswith("allowed="))
    for prefix in environment.PREFIXES:
        assert f"{prefix}[A-Z0-9_]*" in line
    own = {"HF_HOME", "PYTHONPATH", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
    for name in environment.NAMES - own - {"TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR"}:
        assert name in line
