"""The quickstart's recipe on two nodes, with fewer clips and steps: make test-slow."""

from pathlib import Path

import pytest

from tests.launch.faults import KILL_RANK, Faults
from tests.launch.running import (
    ROOT,
    exact,
    finish,
    launcher,
    nobody_stays,
    nodes,
    nothing_left,
    options,
    state,
)
from tests.nodes.sshd import Nodes
from tests.ports import free_port
from tests.tools.run_tool import run_tool

__all__ = ["nobody_stays", "nodes"]  # fixtures

pytestmark = pytest.mark.slow

STEPS = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make quickstart` makes, of 120 clips."""
    folder = tmp_path_factory.mktemp("data")
    made = run_tool("make_quickstart_data", "--output", folder, "--clips", 120, "--eval-clips", 16)
    assert made.returncode == 0, made.stderr
    for split in ("train", "eval"):
        shards, annotations = folder / "shards" / split, folder / f"{split}.jsonl"
        arguments = ["--annotations", annotations, "--output", shards, "--size", 32]
        assert run_tool("precompute", "video", *arguments).returncode == 0
        arguments = ["--tokenizer", folder / "tokenizer", "--output", folder / f"{split}.parquet"]
        assert run_tool("build_manifest", shards, *arguments).returncode == 0
    return folder


def quickstart(data: Path, folder: Path) -> list[object]:
    return [
        *("--", ROOT / "launch/train.py", "--ds_config", ROOT / "ds_configs/zero2.json"),
        *("--recipe", ROOT / "recipes/quickstart.yaml", f"output_dir={folder}/run"),
        f"model.tokenizer={data}/tokenizer",
        f"data.train={data}/train.parquet",
        f"data.eval={data}/eval.parquet",
        *(f"train.steps={STEPS}", "train.log_every=1", "train.eval_every=12"),
        *("train.eval_steps=2", "train.checkpoint_every=4"),
    ]


def test_a_rank_is_killed_and_the_losses_stay(nodes: Nodes, data: Path, tmp_path: Path) -> None:
    alone, apart = tmp_path / "alone", tmp_path / "apart"
    for folder in (alone, apart):
        folder.mkdir()
    (alone / "hostfile").write_text("localhost slots=2\n")
    port = free_port()
    given = ["--hostfile", alone / "hostfile", "--quick", "--master-port", port]
    finish(launcher(*given, "--min-free-gb", "0.01", *quickstart(data, alone)))
    faults = Faults(apart)
    faults.at(1, 6, KILL_RANK)
    output = finish(launcher(*options(nodes, apart, *faults.options), *quickstart(data, apart)))
    assert "first failure: rank 1 on 127.0.0.3: was killed by SIGKILL" in output
    assert state(apart)["num_failures"] == 1
    rows = exact(apart)
    assert max(row["step"] for row in rows) == STEPS
    assert rows == exact(alone)
    nothing_left(apart)
