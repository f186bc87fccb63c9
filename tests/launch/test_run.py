"""The launcher as it is started by hand, on two nodes that are real to ssh."""

import runpy
import time
from pathlib import Path

import psutil
import pytest

from tests.launch.running import ROOT, launcher, nobody_stays, nodes, options, state, training
from tests.nodes.sshd import Nodes
from tests.train import helpers
from vlm.errors import UserError
from vlm.train.metrics import read_rows

__all__ = ["nobody_stays", "nodes"]  # fixtures

PLANTED = {"HF_TOKEN": "hf_planted_0001", "WANDB_API_KEY": "planted-0002"}
FILED = "planted $(id) 0003"
SECRETS = (*PLANTED.values(), FILED, "planted-in-the-host")


def test_two_nodes_train(nodes: Nodes, tmp_path: Path) -> None:
    """Preflight, agents, ranks, logs, timeline; and no secret anywhere but with the ranks."""
    env_file = tmp_path / "env"
    env_file.write_text(f"# for the ranks\nA_PASSWORD={FILED}\n")
    started = launcher(
        *options(nodes, tmp_path, "--env-file", env_file), *training(tmp_path), **PLANTED
    )
    shown = set()  # by `ps`, to everybody
    while started.poll() is None:
        shown |= {" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])}
        time.sleep(0.2)
    output = started.communicate(timeout=240)[0]
    assert started.returncode == 0, output
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    assert max(row["step"] for row in rows) == helpers.STEPS
    found = state(tmp_path)
    assert found["exit_code"] == 0 and found["phase"] == "ended" and found["attempt"] == 1
    assert [rank["step"] for rank in found["ranks"].values()] == [helpers.STEPS] * 2
    timeline = (tmp_path / "run/launch/timeline.log").read_text()
    assert "127.0.0.2 rank 0 | " in timeline and "127.0.0.3 | started" in timeline
    assert "vlm.train" in (tmp_path / "run/launch/logs/rank_00000.log").read_text()
    assert not [line for line in shown if any(value in line for value in SECRETS)]
    env_file.unlink()
    for path in tmp_path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for secret in SECRETS:
                assert secret.encode() not in content, path


def test_misuse(tmp_path: Path) -> None:
    started = launcher("--hostfile", "nowhere")
    output = started.communicate(timeout=60)[0]
    assert started.returncode == 2
    assert output.startswith("error: found no `--`") and output.count("\n") == 1
    main = runpy.run_path(str(ROOT / "launch/run.py"))["main"]
    hostfile = tmp_path / "hosts"
    for argv, said in (
        (["--hostfile", "nowhere", "--"], "nothing behind `--`"),
        (["--hostfile", f"{tmp_path}/none", "--", "launch/train.py"], "/none: No such file"),
        (["--hostfile", str(hostfile), "--", "nowhere.py"], "found no script nowhere.py"),
        (["--hostfile", str(hostfile), "--", "launch/evaluate.py"], "--job FOLDER is needed"),
    ):
        hostfile.write_text("localhost slots=1\n")
        with pytest.raises(UserError, match=said):
            main(argv)
