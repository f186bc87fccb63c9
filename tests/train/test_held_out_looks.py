"""Pictures that evaluations draw, against the saved model; and that a run does not feel them."""

import errno
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from tests.distributed import ranks
from tests.evaluate.world import make_collator, make_sample, make_tokenizer
from tests.models import test_latent as latent
from tests.train import helpers, runs
from tests.train.test_loop import open_source
from vlm.config import Recipe
from vlm.data.load.reader import Reader
from vlm.models import registry
from vlm.train import held_out, held_out_looks, run
from vlm.train.look_pictures import Seen, write_pictures
from vlm.train.preempt import Preemption

#: four of the eight samples of ``helpers.EVAL``, evenly spaced; all have frames
ROWS = [0, 2, 4, 7]


def folder(recipe: Recipe, step: int) -> Path:
    return recipe.output_dir / "attention" / f"step_{step:08d}"


@pytest.mark.parametrize("stage", [2, 3])
def test_pictures_are_those_of_the_saved_model(stage: int, tmp_path: Path) -> None:
    recipe = runs.whole(stage).recipe
    source = open_source(recipe, training=False)
    model = registry.load(runs.checkpoint(recipe, helpers.STEPS) / "model").eval()
    reader, clips = Reader(source.catalog), []
    for row in ROWS:
        loaded = reader.read(row)
        batch = source.collator.batch(
            [loaded.frames], [source.collator.encode(loaded)], ["k"], "video", (16, 16)
        )
        with torch.no_grad():
            maps = model(batch, measure_all=True).maps
        clips.append(Seen(loaded.frames, maps["coarse"].numpy(), maps["fine"].numpy()))
    write_pictures(tmp_path, clips)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2 * len(ROWS)
    steps = sorted(path.name for path in (recipe.output_dir / "attention").iterdir())
    assert steps == [folder(recipe, step).name for step in (helpers.EVERY, helpers.STEPS)]
    differ = []
    for name in names:
        first, last = (pixels(folder(recipe, step) / name) for step in (3, 6))
        # a map that differs in the last bit may be another colour by one
        assert np.abs(last - pixels(tmp_path / name)).max() <= 2
        if name.endswith(".png"):
            frames = slice(0, 14 + 128)  # the row of frames, below its label
            assert (first[frames] == last[frames]).all(), "other samples"
            differ.append((first != last).any())
    assert any(differ), "three steps later the model looks as before"


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_a_run_is_the_same_bit_for_bit_without_pictures() -> None:
    """There is dropout after the first evaluation, so random numbers are the same, too."""
    whole = runs.whole(2)
    recipe = helpers.recipe(runs.new_folder(), "train.eval_pictures=0")
    found = ranks(2).run(runs.fit, recipe, 2)
    assert not (recipe.output_dir / "attention").exists()
    runs.check_same(found, recipe, whole, 0)
    saved, expected = (runs.checkpoint(r, helpers.STEPS) for r in (recipe, whole.recipe))
    for rank in range(2):
        for name in (f"rank_{rank:05d}.json", f"state_{rank:05d}.safetensors"):
            assert (saved / name).read_bytes() == (expected / name).read_bytes(), name


def draw_amid_trouble(recipe: Recipe) -> dict[str, Any]:
    """On each rank under ZeRO-3: what is drawn, and what is said."""
    machine = runs.machine()
    built = run.build_run(recipe, helpers.resolved(3, machine.world_size), machine, Preemption())
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("vlm").addHandler(handler)
    full = OSError(errno.ENOSPC, "No space left on device")
    with mock.patch.object(held_out_looks, "write_pictures", side_effect=full):
        held_out_looks.draw(built, 1)
    nothing = (("key", None) for _ in ROWS)
    with mock.patch.object(
        held_out, "read", (lambda *_: nothing) if machine.rank else held_out.read
    ):
        held_out_looks.draw(built, 2)
    logging.getLogger("vlm").removeHandler(handler)
    return {"said": said, "steps": sorted(p.name for p in recipe.output_dir.glob("attention/*"))}


def test_a_rank_that_cannot_read_or_a_full_disk_holds_nobody_up() -> None:
    recipe = helpers.recipe(runs.new_folder(), "train.modes={coarse_only: 1}")
    first, second = ranks(2).run(draw_amid_trouble, recipe)
    (warning,) = first["said"]
    assert "No space left on device; pictures of step 1 are left out" in warning
    assert first["steps"] == ["step_00000002"] and second["said"] == []
    assert len(list(folder(recipe, 2).iterdir())) == 8
    (width, height) = Image.open(folder(recipe, 2) / "clip_00.png").size
    assert height == 14 + 2 * (128 + 4), "the static query's look alone, as it is trained"


@pytest.mark.parametrize("order", ["frames_first", "question_first"])
def test_frames_stand_where_the_run_has_them(order: str) -> None:
    recipe = helpers.recipe(runs.new_folder(), f"data.eval_orders=[{order}]")
    source = open_source(recipe, training=False)
    built: Any = SimpleNamespace(eval=source, recipe=recipe)
    ((frames, batch),) = held_out_looks._batches(built, ROWS[1:2])
    loaded = Reader(source.catalog).read(ROWS[1])
    assert frames is not None and (frames == loaded.frames).all()
    expected = source.collator.encode(loaded, order == "question_first").input_ids
    assert batch.input_ids.tolist() == expected
    assert (batch.frame_index[0] == 0) == (order == "frames_first")


def test_what_stands_in_for_a_sample_suits_models_with_latents(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    model = latent.make_model()
    collator = make_collator(tokenizer, latent_shape=latent.SHAPE)
    batch = held_out_looks.blank(collator, (16, 16))
    assert not batch.has_frames and batch.num_losses == 0
    assert batch.latents is not None and batch.latents.shape == (1, *latent.SHAPE)
    batch.input_ids.clamp_(max=9)  # the model knows fewer words
    assert set(held_out_looks.look(model, batch)) == {"coarse", "fine"}
    loaded = make_sample(0, "red", 2)._replace(latents=np.ones((2, *latent.SHAPE), np.float16))
    shown = held_out_looks.whole(collator, "k", loaded, question_first=False)
    assert shown.latents is not None and (shown.latents == 1).all()
