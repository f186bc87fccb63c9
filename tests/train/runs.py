"""Whole runs on real ranks, shared by tests: those that only look at a run use the same one."""

import functools
import os
import signal
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from tests.distributed import ranks
from tests.train import helpers
from vlm.ckpt import save
from vlm.config import Recipe
from vlm.data.plan.plan import Position
from vlm.engine.setup import Machine
from vlm.engine.step import Pending, StepResult, eval_step, read, train_step
from vlm.errors import UserError
from vlm.train import loop
from vlm.train.metrics import read_rows
from vlm.train.preempt import Preemption

#: what a run leaves in its folder
FOLDER = [
    "alerts.jsonl",
    "attention",
    "checkpoints",
    "ds_config.json",
    "metrics.csv",
    "metrics.jsonl",
    "plans",
    "recipe.yaml",
    "run_summary.json",
]
#: beginnings of the columns that do not depend on how fast a machine is, or when it was stopped
EXACT = (
    "event",
    "step",
    "epoch",
    "samples_seen",
    "tokens_seen",
    "loss",
    "grad_norm",
    "lr_",
    "eval",
)


class Step(NamedTuple):
    """One step as a rank saw it."""

    result: StepResult
    keys: list[list[str]]


def machine() -> Machine:
    group = torch.distributed
    return Machine(torch.device("cpu"), group.get_rank(), group.get_world_size())


#: steps as a rank saw them, and the exit code
Ended = tuple[list[Step], int]


def fit(recipe: Recipe, stage: int) -> list[Step]:
    """On each rank: trains, and notes every step."""
    return fit_to_end(recipe, stage)[0]


def fit_to_end(recipe: Recipe, stage: int) -> Ended:
    steps: list[Step] = []

    def noted(engine: Any, batches: Any, **options: Any) -> Pending:
        pending = train_step(engine, batches, **options)
        steps.append(Step(read(pending), [batch.keys for batch in batches]))
        return pending

    with (
        mock.patch.object(loop, "train_step", noted),
        Preemption(recipe.train.max_hours) as preemption,
    ):
        ds_config = helpers.resolved(stage, machine().world_size)
        code = loop.fit(recipe, ds_config, machine(), preemption)
    return steps, code


def fit_until_saved(recipe: Recipe, stage: int, killed_at: int) -> None:
    """Rank 0 is killed when all files of the checkpoint of a step are written but not published."""
    sync_tree = save.sync_tree

    def kill(folder: Path) -> None:
        if folder.name.startswith(f"step_{killed_at:08d}"):
            os.kill(os.getpid(), signal.SIGKILL)
        sync_tree(folder)

    with mock.patch.object(save, "sync_tree", kill):
        fit(recipe, stage)


def refused(recipe: Recipe, stage: int) -> str:
    """The user's mistake that keeps a run from starting."""
    try:
        fit(recipe, stage)
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def evaluate(recipe: Recipe, stage: int) -> tuple[dict[str, float], int]:
    """Loss sums of the newest checkpoint on this rank's share of the first held-out step."""
    ds_config = helpers.resolved(stage, machine().world_size)
    run = loop.build_run(recipe, ds_config, machine(), Preemption())
    assert loop.resume(run) is not None
    run.engine.eval()
    return eval_step(run.engine, next(run.steps(run.eval, Position())).batches)


def new_folder() -> Path:
    """In the tiny world, which is removed at the end of the session."""
    return Path(tempfile.mkdtemp(prefix="run-", dir=helpers.world()))


class Run(NamedTuple):
    recipe: Recipe
    #: by rank
    steps: list[list[Step]]


@functools.cache
def whole(stage: int, world_size: int = 2) -> Run:
    """A run of all its steps. Look at its folder, change nothing in it."""
    recipe = helpers.recipe(new_folder())
    return Run(recipe, ranks(world_size).run(fit, recipe, stage))


def check_same(found: list[list[Step]], recipe: Recipe, whole: Run, first: int) -> None:
    """Steps from ``first`` on equal those of a whole run bit for bit, and so do the metric files.

    Every rank's losses, gradient norms, token counts and sample keys.
    """
    for rank, steps in enumerate(found):
        assert steps == whole.steps[rank][first:]
    rows, expected = (read_rows(r.output_dir / "metrics.jsonl") for r in (recipe, whole.recipe))
    assert [_exact(row) for row in rows] == [_exact(row) for row in expected]
    walls = [row["wall_s"] for row in rows if row["event"] == "train"]
    assert walls == sorted(walls) and walls[0] > 0


def _exact(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name.startswith(EXACT)}


def checkpoint(recipe: Recipe, step: int) -> Path:
    return recipe.output_dir / "checkpoints" / f"step_{step:08d}"
