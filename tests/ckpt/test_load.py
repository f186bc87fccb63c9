import json
import logging
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from tests.distributed import RankError, ranks
from tests.train import helpers, runs
from vlm.ckpt import load
from vlm.ckpt.save import COMPLETE, MANIFEST, describe_files, list_files, rank_file, write_json
from vlm.config import Recipe
from vlm.errors import CheckpointError
from vlm.train.metrics import read_rows


def make_checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"step_{step:08d}"
    (path / "model").mkdir(parents=True)
    (path / "states.pt").write_bytes(bytes(range(256)) * 40)
    (path / "model/config.json").write_text("{}")
    write_json(path / MANIFEST, describe_files(path, list_files(path)))
    (path / COMPLETE).touch()
    return path


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def unfinished(path: Path) -> None:
    path.rename(path.with_suffix(".tmp"))


DAMAGE = {
    "never published": (unfinished, "never finished"),
    "no marker": (lambda p: (p / COMPLETE).unlink(), "never finished"),
    "truncated": (lambda p: os.truncate(p / "states.pt", 999), "999 bytes, expected 10240"),
    "flipped byte": (lambda p: flip(p / "states.pt"), "states.pt has changed"),
    "flipped below": (lambda p: flip(p / "model/config.json"), "model/config.json has changed"),
    "a file gone": (lambda p: (p / "states.pt").unlink(), "No such file"),
    "manifest gone": (lambda p: (p / MANIFEST).unlink(), "manifest.json does not fit"),
    "manifest cut": (lambda p: os.truncate(p / MANIFEST, 30), "manifest.json does not fit"),
    "manifest of another kind": (
        lambda p: (p / MANIFEST).write_text('["states.pt"]'),
        "manifest.json does not fit",
    ),
    "manifest without sizes": (
        lambda p: (p / MANIFEST).write_text('{"states.pt": 3}'),
        "manifest.json does not fit",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_and_the_log_says_why(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoil, reason = DAMAGE[damage]
    older, newer = make_checkpoint(tmp_path, 20), make_checkpoint(tmp_path, 30)
    assert load.newest(tmp_path) == newer
    spoil(newer)
    with caplog.at_level(logging.WARNING, "vlm"):
        assert load.newest(tmp_path) == older
    assert "step_00000030" in caplog.text
    assert reason in caplog.text


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert load.newest(tmp_path / "checkpoints") is None
    unfinished(make_checkpoint(tmp_path, 10))
    assert load.newest(tmp_path) is None  # killed in the very first save: start anew


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(tmp_path: Path) -> None:
    flip(make_checkpoint(tmp_path, 10) / "states.pt")
    with pytest.raises(CheckpointError, match="none is whole.*states.pt has changed"):
        load.newest(tmp_path)


def test_identity_says_what_differs() -> None:
    identity = {"world_size": 2, "optim": {"betas": [0.9, 0.99], "lr": {"vision": 1e-3}}}
    load.check_identity(Path("c"), json.loads(json.dumps(identity)), identity)
    load.check_identity(Path("c"), identity, identity | {"world_size": 2})
    found = {"world_size": 4, "optim": {"betas": [0.9, 0.99], "lr": {"vision": 2e-3}}, "old": 1}
    with pytest.raises(CheckpointError) as caught:
        load.check_identity(Path("c"), found, identity)
    assert "world_size was 4 and is now 2" in str(caught.value)
    assert "optim.lr.vision was 0.002 and is now 0.001" in str(caught.value)
    assert "old was 1 and is now None" in str(caught.value)
    assert "betas" not in str(caught.value)


def copy_run(recipe: Recipe, *overrides: str) -> Recipe:
    """A run as it was after its first checkpoint, with its later metrics."""
    other = helpers.recipe(runs.new_folder(), *overrides)
    shutil.copytree(recipe.output_dir, other.output_dir, dirs_exist_ok=True)
    shutil.rmtree(runs.checkpoint(other, helpers.STEPS))
    return other


def check_resumed(found: list[list[runs.Step]], recipe: Recipe, whole: runs.Run) -> None:
    """Bit for bit: every rank's losses, gradient norms, token counts and sample keys."""
    for rank, steps in enumerate(found):
        assert steps == whole.steps[rank][helpers.EVERY :]
    rows, expected = (read_rows(r.output_dir / "metrics.jsonl") for r in (recipe, whole.recipe))
    speed = {"wall_s", "samples_per_s", "tokens_per_s", "data_wait_frac", "peak_memory_gb"}
    windowed = {"fill_frac", "balance", "text_frac"}  # over the last steps of one process
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        for column in row.keys() - speed - windowed:
            assert row[column] == other[column], (row["step"], column)
        assert row["wall_s"] is None or row["wall_s"] > 0
    walls = [row["wall_s"] for row in rows if row["event"] == "train"]
    assert walls == sorted(walls)


def test_killed_while_saving_and_resumed_is_the_same_run() -> None:
    """ZeRO-2: rank 0 is killed with SIGKILL when the last checkpoint is all but published."""
    whole, whole3 = runs.whole(2), runs.whole(3)
    recipe, recipe3 = helpers.recipe(runs.new_folder()), copy_run(whole3.recipe)
    with pytest.raises(RankError, match="rank 0 died"):
        ranks(2).run(runs.fit_until_saved, recipe, 2, helpers.STEPS)
    left = runs.checkpoint(recipe, helpers.STEPS).with_suffix(".tmp")
    assert (left / COMPLETE).exists()
    assert (recipe.output_dir / "checkpoints/latest").read_text() == "step_00000003"
    # from here on in new processes
    check_resumed(ranks(2).run(runs.fit, recipe, 2), recipe, whole)
    assert not left.exists()
    check_resumed(ranks(2).run(runs.fit, recipe3, 3), recipe3, whole3)


@pytest.mark.parametrize(
    ("stage", "world_size", "override", "reason"),
    [
        (2, 2, "optim.lr.vision=0.5", "optim.lr.vision was 0.001 and is now 0.5"),
        (2, 2, "seed=7", "plan_id was"),
        (2, 2, "data.augment.shift_px=0", "augment.shift_px was 1 and is now 0"),
        (2, 2, "train.steps=60", "steps was 6 and is now 60"),
        (2, 2, "model.connector.visual_scale=0.3", "model.connector.visual_scale"),
        (3, 2, "seed=1", "deepspeed.zero_stage was 2 and is now 3"),
        (2, 1, "seed=1", "world_size was 2 and is now 1"),
    ],
)
def test_another_run_does_not_go_on(
    stage: int, world_size: int, override: str, reason: str
) -> None:
    whole = runs.whole(2).recipe
    recipe = helpers.recipe(whole.output_dir, override)
    before = (whole.output_dir / "metrics.jsonl").read_bytes()
    for message in ranks(world_size).run(runs.refused, recipe, stage):
        assert message.startswith("CheckpointError: checkpoint ")
        assert reason in message
    assert (whole.output_dir / "metrics.jsonl").read_bytes() == before
    assert "seed: 1\n" in (whole.output_dir / "recipe.yaml").read_text()


def test_data_and_tokenizer_may_move() -> None:
    recipe = runs.whole(2).recipe
    moved = runs.new_folder() / "moved"
    for name in ("tokenizer", "shards"):
        shutil.copytree(helpers.world() / name, moved / name)
    for name in ("train.parquet", "eval.parquet"):
        shutil.copy(helpers.world() / name, moved / name)
    other = helpers.recipe(
        recipe.output_dir,
        f"data.train={moved}/train.parquet",
        f"data.eval={moved}/eval.parquet",
        f"model.tokenizer={moved}/tokenizer",
        "train.log_every=2",
        "model.vision.gradient_checkpointing=true",
    )
    other = copy_run(recipe).model_copy(
        update={"model": other.model, "data": other.data, "train": other.train}
    )
    assert [len(steps) for steps in ranks(2).run(runs.fit, other, 2)] == [helpers.EVERY] * 2


def test_damaged_checkpoints_stop_all_ranks() -> None:
    recipe = copy_run(runs.whole(2).recipe)
    flip(runs.checkpoint(recipe, helpers.EVERY) / rank_file(1))
    for message in ranks(2).run(runs.refused, recipe, 2):
        assert "none is whole (step_00000003: rank_00001.pt has changed" in message


class Doctored:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def doctor(path: Path, name: str, trace: Path) -> None:
    """Puts a trap into a file of a checkpoint and makes the manifest fit it."""
    torch.save({"trap": Doctored(trace)}, path / name)
    (path / COMPLETE).unlink()
    (path / MANIFEST).unlink()
    write_json(path / MANIFEST, describe_files(path, list_files(path)))
    (path / COMPLETE).touch()
    assert load.find_fault(path) is None


def unpickling_error(recipe: Recipe, stage: int) -> bool:
    try:
        runs.fit(recipe, stage)
    except pickle.UnpicklingError:
        return True
    return False


@pytest.mark.parametrize(
    "name", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "rank"]
)
def test_a_trap_in_a_checkpoint_is_not_sprung(name: str, tmp_path: Path) -> None:
    recipe = helpers.recipe(runs.new_folder())
    done = runs.whole(2, world_size=1).recipe.output_dir
    shutil.copytree(done, recipe.output_dir, dirs_exist_ok=True)
    path, trace = runs.checkpoint(recipe, helpers.STEPS), tmp_path / "trace"
    doctor(path, rank_file(0) if name == "rank" else name, trace)
    assert ranks(1).run(unpickling_error, recipe, 2) == [True]
    assert not trace.exists()
