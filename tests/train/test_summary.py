import json
import math
import subprocess
from pathlib import Path

import pytest

from vlm import dist
from vlm.train.summary import SUMMARY, RunSummary, git_state


def read(folder: Path) -> dict:
    return json.loads((folder / SUMMARY).read_text())


def test_a_run_that_ends_well(tmp_path: Path) -> None:
    with RunSummary(tmp_path, {"name": "r"}) as summary:
        # what a run that is killed now leaves behind
        assert read(tmp_path)["status"] == "running"
        summary.update({"steps_done": 3, "final_train_loss": math.nan})
        assert read(tmp_path)["steps_done"] == 3
        summary.status = "finished"
    found = read(tmp_path)
    assert found["status"] == "finished" and found["error"] is None
    assert found["final_train_loss"] == "nan"
    assert {"deepspeed", "torch", "transformers", "python"} <= found["versions"].keys()
    assert found["started"] <= found["updated"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("a\nb"), "failed"),
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(3), "failed"),
    ],
)
def test_a_run_that_does_not(tmp_path: Path, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), RunSummary(tmp_path, {}) as summary:
        summary.update({"steps_done": 7})
        raise error
    found = read(tmp_path)
    assert (found["status"], found["steps_done"]) == (status, 7)
    assert found["error"].startswith(type(error).__name__)
    assert "\n" not in found["error"]


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "rank", lambda: 1)
    with RunSummary(tmp_path, {}) as summary:
        summary.update({"steps_done": 7})
    assert list(tmp_path.iterdir()) == []


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_and_whether_it_is_what_runs(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "a")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == {"commit": commit, "dirty": True}


def test_without_git(tmp_path: Path) -> None:
    assert git_state(tmp_path / "nowhere") is None
