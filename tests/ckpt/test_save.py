import errno
import hashlib
import itertools
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.ckpt.folders import names
from tests.distributed import RankError, ranks
from tests.train import helpers, runs
from vlm.ckpt import keep, save
from vlm.config import Recipe
from vlm.data.plan.plan import Position
from vlm.engine.step import eval_step
from vlm.errors import CheckpointError
from vlm.heartbeat import Heartbeat
from vlm.models import registry
from vlm.train import data
from vlm.train.metrics import read_rows

RANK_FILES = [
    "rank_00000.json",
    "rank_00001.json",
    "state_00000.safetensors",
    "state_00001.safetensors",
]


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_checkpoint_holds_what_the_documentation_says(stage: int) -> None:
    recipe = runs.whole(stage).recipe
    folder = recipe.output_dir / "checkpoints"
    assert names(folder) == ["best", "latest", "step_00000003", "step_00000006"]
    assert (folder / "latest").read_text() == "step_00000006"
    path = runs.checkpoint(recipe, helpers.STEPS)
    files = [str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()]
    ours = ["COMPLETE", "manifest.json", "trainer.json"]
    model = [name for name in files if name.startswith("model/")]
    assert sorted(files) == sorted([*ours, *RANK_FILES, *model])
    assert {"model/config.json", "model/model.safetensors", "model/tokenizer.json"} <= {*model}
    manifest = json.loads((path / "manifest.json").read_text())
    assert sorted(manifest) == sorted({*files} - {"COMPLETE", "manifest.json"})
    for name, entry in manifest.items():
        content = (path / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_the_best_is_that_of_the_lowest_held_out_loss() -> None:
    recipe = runs.whole(2).recipe
    rows = [r for r in read_rows(recipe.output_dir / "metrics.jsonl") if r["event"] == "eval"]
    best = min(rows, key=lambda row: row["eval_loss"])
    pointer = recipe.output_dir / "checkpoints/best"
    assert pointer.read_text() == runs.checkpoint(recipe, best["step"]).name


def test_the_state_counts_what_ran() -> None:
    whole = runs.whole(2)
    trainer = json.loads((runs.checkpoint(whole.recipe, 3) / "trainer.json").read_text())
    steps = [step for rank in whole.steps for step in rank[:3]]
    assert trainer["state"]["step"] == 3
    assert trainer["state"]["samples_seen"] == sum(len(keys) for s in steps for keys in s.keys)
    assert trainer["state"]["wall_s"] > 0
    assert trainer["world_size"] == 2


def test_a_save_is_measured() -> None:
    """Against the bytes that lie there; the stall is part of the wall time of the run."""
    recipe = runs.whole(2).recipe
    rows = [r for r in read_rows(recipe.output_dir / "metrics.jsonl") if r["event"] == "checkpoint"]
    assert [row["step"] for row in rows] == [3, 6]
    files = json.loads((runs.checkpoint(recipe, 6) / "manifest.json").read_text())
    for row in rows:
        assert row["checkpoint_stall_s"] > 0
    num_bytes = sum(entry["bytes"] for entry in files.values())
    assert rows[-1]["checkpoint_gb"] * 2**30 == pytest.approx(num_bytes)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_exported_model_is_the_engines(stage: int) -> None:
    """Without DeepSpeed, from another process: the same losses on the same samples."""
    recipe = runs.whole(stage).recipe
    found = ranks(2).run(runs.evaluate, recipe, stage)
    model = registry.load(runs.checkpoint(recipe, helpers.STEPS) / "model").eval()
    tokenizer = data.load_tokenizer(recipe)
    source = data.open_source(recipe, tokenizer, training=False)
    for rank, (sums, tokens) in enumerate(found):
        loaded = next(data.steps(source, recipe, rank, 2, Position()))
        expected, num_tokens = eval_step(Plain(model), loaded.batches)
        assert tokens == num_tokens
        assert sums == pytest.approx(expected, rel=1e-6)


class Plain:
    """What ``eval_step`` needs of an engine."""

    device = torch.device("cpu")

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self.model(*args, **kwargs)


def test_the_exported_tokenizer_is_the_one_of_the_recipe() -> None:
    recipe = runs.whole(2).recipe
    exported = runs.checkpoint(recipe, helpers.STEPS) / "model"
    other = recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"tokenizer": str(exported)})}
    )
    turns = [{"role": "user", "content": "What colour?"}]
    first, second = (data.load_tokenizer(r).apply_chat_template(turns) for r in (recipe, other))
    assert first["input_ids"] == second["input_ids"]


def fit_with_fault(recipe: Recipe, stage: int, rank: int, num: int) -> tuple[list[runs.Step], str]:
    """The disk of one rank is full for ``num`` saves from the second on; 0: the rank is killed."""
    saves = itertools.count()
    failing = range(1, 1 + num)
    write_pieces = save.write_pieces

    def write(engine: object, folder: Path) -> object:
        at = next(saves)
        if runs.machine().rank == rank and at >= 1:
            if not num:
                os.kill(os.getpid(), signal.SIGKILL)
            if at in failing:
                (folder / "half").write_bytes(b"x")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        return write_pieces(engine, folder)

    steps: list[runs.Step] = []
    with mock.patch.object(save, "write_pieces", write):
        try:
            steps = runs.fit(recipe, stage)
        except CheckpointError as error:
            return steps, str(error)
    return steps, "nothing"


EVERY_STEP = ("train.checkpoint_every=1", "train.keep_last=1", "train.keep_best=false")


def test_a_disk_that_is_full_for_a_while_costs_only_that_save() -> None:
    """Rank 1 cannot write after steps 2 and 3: the checkpoint of step 1 stays, training goes on."""
    recipe = helpers.recipe(runs.new_folder(), *EVERY_STEP)
    found = ranks(2).run(fit_with_fault, recipe, 2, 1, 2)
    for (steps, message), expected in zip(found, runs.whole(2).steps, strict=True):
        assert message == "nothing"
        assert steps == expected
    rows = read_rows(recipe.output_dir / "metrics.jsonl")
    assert [row["step"] for row in rows if row["event"] == "checkpoint"] == [1, 4, 5, 6]
    assert names(recipe.output_dir / "checkpoints") == ["latest", "step_00000006"]


def test_a_disk_that_stays_full_stops_all_ranks_and_keeps_what_there_is() -> None:
    recipe = helpers.recipe(runs.new_folder(), *EVERY_STEP)
    for _, message in ranks(2).run(fit_with_fault, recipe, 2, 1, 9):
        assert "writing failed on rank 1: [Errno 28] No space left on device" in message
    folder = recipe.output_dir / "checkpoints"
    assert names(folder) == ["latest", "step_00000001"]
    found = ranks(2).run(runs.fit, recipe, 2)
    assert [steps for steps in found] == [steps[1:] for steps in runs.whole(2).steps]


@pytest.mark.slow
def test_a_rank_that_dies_while_it_saves_costs_only_that_save() -> None:
    recipe = helpers.recipe(runs.new_folder(), *EVERY_STEP)
    with pytest.raises(RankError, match="rank 1 died"):
        ranks(2).run(fit_with_fault, recipe, 3, 1, 0)
    assert (recipe.output_dir / "checkpoints/latest").read_text() == "step_00000001"
    found = ranks(2).run(runs.fit, recipe, 3)
    assert found == [steps[1:] for steps in runs.whole(3).steps]


def read_only(recipe: Recipe, stage: int) -> str:
    """The folder of the run cannot be written; a file in its place, since root may write any."""
    (recipe.output_dir / "checkpoints").write_text("")
    return runs.refused(recipe, stage)


def test_a_folder_that_cannot_be_written_is_one_clear_error() -> None:
    recipe = helpers.recipe(runs.new_folder(), "train.steps=1")
    (message,) = ranks(1).run(read_only, recipe, 2)
    assert "clearing failed on rank 0" in message and "File exists" in message


def slow_copy(recipe: Recipe, stage: int) -> list[runs.Step]:
    """Nothing of step 4 is copied before this rank has trained step 5."""
    copy, train_step = save.copy, runs.train_step
    trained = threading.Event()

    def late(source: Path, target: Path) -> object:
        if "step_00000004" in str(target) and not trained.wait(60):
            raise OSError(errno.EDEADLK, "training waits for the copy", str(source))
        return copy(source, target)

    def noted(engine: Any, batches: Any, **options: Any) -> object:
        pending = train_step(engine, batches, **options)
        if engine.global_steps == 5:
            trained.set()
        return pending

    with mock.patch.object(save, "copy", late), mock.patch.object(runs, "train_step", noted):
        return runs.fit(recipe, stage)


def test_training_goes_on_while_a_checkpoint_is_copied() -> None:
    """A slow volume. Only the first is waited for, since a run checks what it holds."""
    often = ("train.checkpoint_every=2", "train.keep_last=2", "train.keep_best=false")
    recipe = helpers.recipe(runs.new_folder(), f"train.local_dir={runs.new_folder()}", *often)
    found = ranks(2).run(slow_copy, recipe, 2)
    assert found == runs.whole(2).steps
    folder = recipe.output_dir / "checkpoints"
    assert names(folder) == ["latest", "step_00000004", "step_00000006"]
    for step in (4, 6):
        path = runs.checkpoint(recipe, step)
        files = json.loads((path / "manifest.json").read_text())
        for name, entry in files.items():
            assert hashlib.sha256((path / name).read_bytes()).hexdigest() == entry["sha256"]


def fit_with_failing_copies(recipe: Recipe, stage: int, num: int) -> tuple[int, str, list[str]]:
    """The slow volume refuses rank 1's first file of the first ``num`` checkpoints.

    Returns:
        Steps trained, the error that ended it, and what a launcher heard of saves.
    """
    copy, calls = save.copy, itertools.count()
    heard: list[str] = []

    def beat(self: Heartbeat, phase: str, step: int, shards: Any = ()) -> None:
        if phase.startswith("save"):
            heard.append(phase)

    def failing(source: Path, target: Path) -> object:
        if runs.machine().rank == 1 and next(calls) < num:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        return copy(source, target)

    with mock.patch.object(save, "copy", failing), mock.patch.object(Heartbeat, "beat", beat):
        try:
            return len(runs.fit(recipe, stage)), "nothing", heard
        except CheckpointError as error:
            return 0, str(error), heard


def test_a_copy_that_fails_costs_only_that_checkpoint() -> None:
    local = f"train.local_dir={runs.new_folder()}"
    recipe = helpers.recipe(runs.new_folder(), *EVERY_STEP, local, "train.keep_last=9")
    found = ranks(2).run(fit_with_failing_copies, recipe, 2, 2)
    # until one is whole each is waited for at once, later ones by the next save
    heard = ["save"] * 4 + ["save and copy"] * 2
    assert found == [(helpers.STEPS, "nothing", heard)] * 2
    kept = [f"step_{step:08d}" for step in range(3, 7)]
    assert names(recipe.output_dir / "checkpoints") == ["latest", *kept]
    recipe = helpers.recipe(runs.new_folder(), *EVERY_STEP, local)
    for _, message, _ in ranks(2).run(fit_with_failing_copies, recipe, 2, 9):
        assert "copying failed on rank 1: [Errno 28] No space left on device" in message
    assert names(recipe.output_dir / "checkpoints") == []


def noted_saves(recipe: Recipe, stage: int) -> list[tuple[str, str]]:
    """What happens to files, in order."""
    fsync, rename, remove = os.fsync, os.replace, keep.remove
    events: list[tuple[str, str]] = []

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        events.append(("synced", os.readlink(f"/proc/self/fd/{descriptor}")))

    def renamed(source: Path, target: Path) -> None:
        rename(source, target)
        events.append(("renamed", str(target)))

    def removed(path: Path, marker: str) -> None:
        remove(path, marker)
        events.append(("removed", str(path)))

    with (
        mock.patch.object(os, "fsync", synced),
        mock.patch.object(os, "replace", renamed),
        mock.patch.object(keep, "remove", removed),
    ):
        runs.fit(recipe, stage)
    return events


def test_an_old_one_goes_only_when_the_new_one_is_on_the_disk() -> None:
    recipe = helpers.recipe(runs.new_folder(), *EVERY_STEP, "train.steps=2")
    (events,) = ranks(1).run(noted_saves, recipe, 2)
    folder = recipe.output_dir / "checkpoints"
    old, new = runs.checkpoint(recipe, 1), runs.checkpoint(recipe, 2)
    published = events.index(("renamed", str(new)))
    written = {path for event, path in events[:published] if event == "synced"}
    assert {f"{new}.tmp/{p.relative_to(new)}" for p in new.rglob("*")} | {f"{new}.tmp"} <= written
    pointed = events.index(("renamed", str(folder / "latest")), published)
    durable = events.index(("synced", str(folder)), pointed)
    assert durable < events.index(("removed", str(old)))
