import base64
import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ckpt.folders import change, flip, make_checkpoint, seal, unfinished
from tests.distributed import RankError, ranks
from tests.train import helpers, runs
from vlm.ckpt import load
from vlm.ckpt.engine_state import state_file
from vlm.ckpt.keep import COMPLETE
from vlm.ckpt.save import MANIFEST, TRAINER, rank_file
from vlm.config import Recipe
from vlm.errors import CheckpointError

STATE = state_file(0)


def manifest(text: str) -> Callable[[Path], object]:
    return lambda path: (path / MANIFEST).write_text(text)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "never published": (unfinished, "never finished"),
    "no marker": (lambda p: (p / COMPLETE).unlink(), "never finished"),
    "truncated": (lambda p: os.truncate(p / STATE, 999), "999 bytes, expected 10240"),
    "flipped byte": (lambda p: flip(p / STATE), f"{STATE} has changed"),
    "flipped below": (lambda p: flip(p / "model/config.json"), "model/config.json has changed"),
    "a file gone": (lambda p: (p / STATE).unlink(), "No such file"),
    "manifest gone": (lambda p: (p / MANIFEST).unlink(), "manifest.json does not fit"),
    "manifest cut": (lambda p: os.truncate(p / MANIFEST, 30), "manifest.json does not fit"),
    "manifest of another kind": (manifest(f'["{STATE}"]'), "manifest.json does not fit"),
    "manifest without sizes": (manifest(f'{{"{STATE}": 3}}'), "manifest.json does not fit"),
    "manifest of elsewhere": (manifest('{"../x": {"bytes": 1}}'), "expected files of the check"),
    "manifest of the system": (manifest('{"/etc/passwd": {}}'), "expected files of the check"),
    "manifest too deep": (manifest("[" * 99_999), "manifest.json does not fit"),
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
    flip(make_checkpoint(tmp_path, 10) / STATE)
    with pytest.raises(CheckpointError, match=f"none is whole.*{STATE} has changed"):
        load.newest(tmp_path)


def test_a_json_file_of_any_size_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "MAX_JSON", 100)
    (make_checkpoint(tmp_path, 10) / MANIFEST).write_text("[" + " " * 100 + "]")
    with pytest.raises(CheckpointError, match="found 102 bytes, expected at most 100"):
        load.newest(tmp_path)


def newest_seen(folder: Path, hidden: Path | None) -> str:
    """What a rank finds, of which rank 1 sees another folder than rank 0."""
    seen = hidden if hidden is not None and runs.machine().rank == 1 else folder
    try:
        found = load.newest(seen)
    except CheckpointError as error:
        return str(error)
    return "nothing" if found is None else found.name


def test_ranks_agree_before_any_of_them_loads(tmp_path: Path) -> None:
    """A folder that one rank sees otherwise stops all, or all go on from the one they share."""
    one, other = tmp_path / "one", tmp_path / "other"
    make_checkpoint(one, 10)
    make_checkpoint(one, 20)
    shutil.copytree(one, other)
    assert ranks(2).run(newest_seen, one, other) == ["step_00000020"] * 2
    shutil.rmtree(other / "step_00000020")
    assert ranks(2).run(newest_seen, one, other) == ["step_00000010"] * 2
    (other / "step_00000010" / "more").write_text("x")
    seal(other / "step_00000010")
    for message in ranks(2).run(newest_seen, one, other):
        assert "ranks see different files" in message and "expected one folder for all" in message


def test_identity_says_what_differs() -> None:
    identity = {"steps": 2, "optim": {"betas": [0.9, 0.99], "lr": {"vision": 1e-3}}}
    load.check_identity(Path("c"), json.loads(json.dumps(identity)), identity)
    found = {"steps": 4, "optim": {"betas": [0.9, 0.99], "lr": {"vision": 2e-3}}, "old": 1}
    with pytest.raises(CheckpointError) as caught:
        load.check_identity(Path("c"), found, identity)
    assert "steps was 4 and is now 2" in str(caught.value)
    assert "optim.lr.vision was 0.002 and is now 0.001" in str(caught.value)
    assert "old was 1 and is now None" in str(caught.value)
    assert "betas" not in str(caught.value)


def copy_run(recipe: Recipe, *overrides: str) -> Recipe:
    """A run as it was after its first checkpoint, with its later metrics."""
    other = helpers.recipe(runs.new_folder(), *overrides)
    shutil.copytree(recipe.output_dir, other.output_dir, dirs_exist_ok=True)
    shutil.rmtree(runs.checkpoint(other, helpers.STEPS))
    return other


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
    runs.check_same(ranks(2).run(runs.fit, recipe, 2), recipe, whole, helpers.EVERY)
    assert not left.exists()
    runs.check_same(ranks(2).run(runs.fit, recipe3, 3), recipe3, whole3, helpers.EVERY)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("optim.lr.vision=0.5", "optim.lr.vision was 0.001 and is now 0.5"),
        ("seed=7", "plan_id was"),
        ("data.augment.shift_px=0", "augment.shift_px was 1 and is now 0"),
        ("train.steps=60", "steps was 6 and is now 60"),
        ("model.connector.visual_scale=0.3", "model.connector.visual_scale"),
    ],
)
def test_another_run_does_not_go_on(override: str, reason: str) -> None:
    whole = runs.whole(2).recipe
    recipe = helpers.recipe(whole.output_dir, override)
    before = (whole.output_dir / "metrics.jsonl").read_bytes()
    for message in ranks(2).run(runs.refused, recipe, 2):
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
        assert "none is whole (step_00000003: rank_00001.json has changed" in message


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def edit(name: str, **values: object) -> Callable[[Path, bytes], object]:
    return lambda path, _: change(path / name, **values)


def put(name: str) -> Callable[[Path, bytes], object]:
    return lambda path, trap: (path / name).write_bytes(trap)


COUNTED = {"global_steps": 1, "global_samples": 1, "skipped_steps": 0, "loss_scaler": {}} | {
    "last_epoch": 1,
    "step_count": 1,
}
#: what somebody made of a checkpoint, hashes and all, and what the one line says of it
DOCTORED: dict[str, tuple[Callable[[Path, bytes], object], str]] = {
    "pickled state": (put(STATE), "expected safetensors"),
    "pickled random states": (put(rank_file(0)), "expected JSON"),
    "pickled trainer": (put(TRAINER), "expected JSON"),
    "no state": (edit(TRAINER, state=None), "trainer.json does not fit: state"),
    "a field less": (edit(TRAINER, state={"step": 3}), "trainer.json does not fit"),
    "a step in words": (edit(TRAINER, engine={**COUNTED, "global_steps": "x"}), "global_steps"),
    "a counter more": (edit(TRAINER, engine={**COUNTED, "more": 1}), "expected the keys"),
    "too many ranks": (edit(TRAINER, world_size=10**18), "state_00001.safetensors is missing"),
    "no ranks": (edit(TRAINER, world_size=0), "trainer.json does not fit: world_size"),
    "pickled generator": (edit(rank_file(0), torch="gASV"), "random states of a rank"),
}


@pytest.mark.parametrize("how", DOCTORED)
def test_a_doctored_checkpoint_is_one_clear_message(how: str, tmp_path: Path) -> None:
    spoil, reason = DOCTORED[how]
    recipe = helpers.recipe(runs.new_folder())
    done = runs.whole(2, world_size=1).recipe.output_dir
    shutil.copytree(done, recipe.output_dir, dirs_exist_ok=True)
    path, trace = runs.checkpoint(recipe, helpers.STEPS), tmp_path / "trace"
    trap = pickle.dumps(Trap(trace))
    spoil(path, trap)
    seal(path)
    (message,) = ranks(1).run(runs.refused, recipe, 2)
    assert message.startswith("CheckpointError: "), message
    assert reason in message
    assert not trace.exists()
    pickle.loads(trap)  # it would have sprung
    assert trace.exists() and base64.b64decode("gASV")[:2] == trap[:2]
