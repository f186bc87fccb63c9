"""The heaviest micro-batch against real passes, and what is advised."""

import itertools
import json
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.estimate.allocated import allocated
from tests.models import test_latent, tiny
from tests.train import helpers
from tests.train.families import FAMILIES, NO_DROPOUT
from vlm.config_model import COMPONENTS
from vlm.data.plan import planning
from vlm.data.plan.plan import Position
from vlm.estimate import workload
from vlm.estimate.activations import pass_bytes
from vlm.estimate.fits import BY_SPEED, Fit, Hardware, _worst, sizes_of
from vlm.estimate.fits import advice as advise
from vlm.gpus import Gpu
from vlm.train import data
from vlm.train import model as models

GIB = 2**30


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "foveated_latent"])
def test_the_heaviest_micro_batches_bound_what_any_of_the_plan_really_takes(
    family: str, tmp_path: Path
) -> None:
    recipe = helpers.recipe(tmp_path, NO_DROPOUT, "train.steps=3", *FAMILIES[family])
    tokenizer = data.load_tokenizer(recipe)
    work = workload.of_recipe(recipe, (tiny.SIZE, tiny.SIZE), 1)
    model = models.build(recipe, len(tokenizer)).train()
    mode = model.modes[0]
    with torch.device("meta"):
        twin = models.build(recipe, len(tokenizer))
    worst = _worst(twin, recipe, work, torch.float32).bytes
    source = data.open_source(recipe, tokenizer, training=True)
    peaks = []
    with closing(data.steps(source, recipe, 0, 1, Position())) as steps:
        for step in itertools.islice(steps, recipe.train.steps):
            peaks += [allocated(model, batch, mode).peak for batch in step.batches]
    assert len(peaks) >= 8
    assert 0.9 * worst.peak < max(peaks) <= 1.001 * worst.peak


def test_the_worst_of_all_windows_is_among_the_few_that_are_tried(tmp_path: Path) -> None:
    """Against the bytes of every micro-batch of the run; the worst is not in the first window."""
    recipe = helpers.recipe(tmp_path, "data.window=16", "train.steps=8", *FAMILIES["multi_token"])
    with torch.device("meta"):
        model = models.build(recipe, 300)
    work = workload.of_recipe(recipe, (1, 1), 1)
    tried = _worst(model, recipe, work, torch.bfloat16)
    _, plan = planning.open_plan(recipe)
    peaks = {}
    for planned in itertools.islice(plan.steps(), recipe.train.steps):
        for micro in planned.step:
            shapes = workload._shapes(plan, micro, tried.shapes.frame_size)
            batch = workload.batch_of(shapes, plan.policy.tokens_per_frame)
            found = pass_bytes(model, batch, torch.bfloat16).peak
            peaks[planned.at.window] = max(found, peaks.get(planned.at.window, 0))
    assert tried.bytes.peak == max(peaks.values()) > peaks[0]


def test_an_autoencoder_that_makes_latents_lies_beside_the_model(tmp_path: Path) -> None:
    name = test_latent.save_autoencoder(tmp_path)
    keys = {"latent_size": tiny.SIZE // 2, "autoencoder": name}
    recipe = helpers.recipe(
        tmp_path, "model.family=foveated_latent", f"model.connector={json.dumps(keys)}"
    )
    with torch.device("meta"):
        model = models.build(recipe, 300)
    sizes = sizes_of(model, recipe)
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert sizes.packed_bytes == sum(weight.nbytes for weight in weights.values())


def fit(name: str, total: float, passing: float) -> Fit:
    """In GiB."""
    parts = dict.fromkeys(("weights", "gradients", "optimizer", "buckets", "logits", "frames"), 0)
    activations, size = int(passing * GIB), int(total * GIB)
    return Fit(
        name, **parts, activations=activations, reserved=0, total=size, host=0, fits=size <= 8 * GIB
    )


def advice(chosen: str, totals: dict[str, float], *overrides: str, passing: float = 3.0) -> str:
    fits = {name: fit(name, totals.get(name, 20.0), passing) for name in BY_SPEED}
    hardware = Hardware(Gpu(1e12, 8.0), 1, 2, 0.5, None)
    return advise(chosen, fits, helpers.recipe(Path("unused"), *overrides), hardware)


def test_advice_says_what_to_change_first() -> None:
    assert advice("zero1", {"zero1": 7.0}) == "zero1 fits"
    two = {"zero3": 7.0, "zero2_offload": 5.0}
    assert advice("zero2", two) == "zero2 does not fit: use ds_configs/zero3.json"
    near = {"zero3_offload": 9.0}
    assert "set model.vision.gradient_checkpointing=true model.language" in advice("zero2", near)
    lean = [f"model.{part}.gradient_checkpointing=true" for part in COMPONENTS]
    # one GiB of three too much, and a tenth to spare
    assert "lower data.budget from 300 to about 190" in advice("zero2", near, *lean)
    assert "zero3_offload needs 9 GiB of 8" in advice("zero2", near, passing=0.5)
