"""A signal to a run that the deepspeed launcher started: real processes, as rented hosts end them.

``deepspeed`` forwards nothing, the process below it ends ranks one after another; what counts is
that all of them save the same step first.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.ports import free_port
from tests.train import helpers, runs
from tests.waiting import wait_for
from vlm.errors import EXIT_PREEMPTED
from vlm.train.metrics import read_rows

PATIENCE_S = 300.0


class Job:
    """A run on two ranks that would take hours."""

    def __init__(self, process: subprocess.Popen, folder: Path) -> None:
        self.process, self.folder = process, folder

    def num_steps(self) -> int:
        """As the metrics say by now."""
        path = self.folder / "metrics.jsonl"
        rows = read_rows(path) if path.exists() else []
        return max((int(row["step"]) for row in rows if row["event"] == "train"), default=0)

    def ranks(self) -> list[psutil.Process]:
        below = psutil.Process(self.process.pid).children(recursive=True)
        found = [child for child in below if "CROSS_RANK" in child.environ()]
        return sorted(found, key=lambda rank: int(rank.environ()["RANK"]))

    def saved(self) -> int:
        name = (self.folder / "checkpoints/latest").read_text()
        assert (self.folder / "checkpoints" / name / "COMPLETE").exists()
        return int(name.removeprefix("step_"))

    def log(self) -> str:
        return (self.folder.parent / "log").read_text()


@contextmanager
def job() -> Iterator[Job]:
    folder = runs.new_folder() / "run"
    launcher = Path(sys.executable).with_name("deepspeed")
    recipe = helpers.world() / "recipe.yaml"
    arguments = [
        *("--ds_config", helpers.ds_file(2), "--recipe", recipe, f"output_dir={folder}"),
        *("train.steps=100000", "train.checkpoint_every=50000", "train.eval_every=50000"),
        "train.mtbf_hours=4",
    ]
    with (folder.parent / "log").open("w") as log:
        process = subprocess.Popen(
            [launcher, "--num_gpus", "2", "--master_port", str(free_port())]
            + [helpers.ROOT / "launch/train.py", *arguments],
            cwd=helpers.ROOT,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    found = Job(process, folder)
    try:
        wait_for(lambda: found.num_steps() >= 2, PATIENCE_S)
        yield found
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_within_two_steps_with_code_75() -> None:
    with job() as running:
        rank = running.ranks()[1]
        before = running.num_steps()
        rank.send_signal(signal.SIGUSR1)
        after = running.num_steps()
        assert running.process.wait(PATIENCE_S) == EXIT_PREEMPTED, running.log()
        assert before < running.saved() <= after + 2
        assert running.num_steps() == running.saved()
        assert "stopping at the next step: SIGUSR1" in running.log()
        assert "at one failure in 4 h the best interval is" in running.log()
        assert "Traceback" not in running.log()


@pytest.mark.slow
def test_the_launcher_is_told_and_takes_ranks_down_one_by_one() -> None:
    with job() as running:
        ranks = running.ranks()
        ranks[0].parent().send_signal(signal.SIGTERM)
        assert running.process.wait(PATIENCE_S) == 1  # DeepSpeed's own code
        assert running.saved() == running.num_steps()
        assert not any(rank.is_running() for rank in ranks)


@pytest.mark.slow
def test_the_command_is_killed_and_leaves_its_ranks_behind() -> None:
    with job() as running:
        ranks = running.ranks()
        running.process.terminate()
        assert running.process.wait(PATIENCE_S) == -signal.SIGTERM
        psutil.wait_procs(ranks, PATIENCE_S)
        assert running.saved() == running.num_steps()
        assert "stopping at the next step: the deepspeed launcher is gone" in running.log()
