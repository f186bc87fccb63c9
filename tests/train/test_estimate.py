"""Sums, time and advice of an estimate. Its parts are held to real passes in their own tests."""

import itertools
import json
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.models import cases, test_latent, tiny
from tests.models import test_cross_attention as cross_attention
from tests.train import helpers
from tests.train.allocated import allocated
from vlm.config_model import COMPONENTS
from vlm.data.plan.plan import Position
from vlm.gpus import Gpu
from vlm.train import data, workload
from vlm.train import model as models
from vlm.train.estimate import (
    BY_SPEED,
    RESERVED,
    Estimate,
    Fit,
    Hardware,
    _advice,
    _meta_model,
    _sizes,
    _worst,
    estimate,
)

GIB = 2**30


GPT2 = {k: v for k, v in cross_attention.GPT2.items() if k != "vocab_size"} | cases.NO_DROPOUT
#: what a recipe changes, by family
FAMILIES = {
    "foveated": (),
    "multi_token": ("model.family=multi_token", "model.connector={tokens_per_frame: 4}"),
    "blind": ("model.family=blind", "model.freeze=[vision, connector]", "model.connector={}"),
    "cross_attention": (
        "model.family=cross_attention",
        f"model.vision={json.dumps({'config': cross_attention.VIT})}",
        f"model.language={json.dumps({'config': GPT2})}",
        "model.connector={}",
    ),
    "foveated_latent": ("model.family=foveated_latent", "model.connector={latent_size: 2}"),
}
#: with dropout a CPU has no attention that keeps what flash attention keeps
NO_DROPOUT = "model.language.config.attention_dropout=0"


def run(folder: Path, *overrides: str) -> Estimate:
    recipe = helpers.recipe(folder, *overrides)
    config = {**helpers.resolved(2, 2), "bf16": {"enabled": True}}
    config["zero_optimization"] |= {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000}
    hardware = Hardware(Gpu(1e12, 80.0), 1, 2, 0.5, 3.0)
    return estimate(recipe, config, 300, hardware)


def test_sums_time_and_money(tmp_path: Path) -> None:
    found = run(tmp_path)
    assert list(found.fits) == [
        *("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
    ]
    assert found.chosen == "zero2" and found.advice == "zero2 fits"
    fit = found.fits["zero2"]
    parts = fit.weights + fit.gradients + fit.optimizer + fit.buckets
    parts += fit.activations + fit.logits + fit.frames
    assert fit.total == parts + fit.reserved and fit.reserved > RESERVED
    assert found.fits["zero3_offload"].host > found.fits["zero3"].host
    # two ranks at best share the work equally, at 0.5 of 1e12 operations a second
    assert found.step_s >= found.hardware_flops / 2 / 0.5e12
    assert found.step_s <= 1.5 * found.hardware_flops / 2 / 0.5e12
    assert found.hours == pytest.approx(found.step_s * helpers.STEPS / 3600)
    assert found.price == pytest.approx(found.hours * 2 * 3.0)
    assert found.model_flops < found.hardware_flops


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


def projected(family: str, tower: dict, connector: dict) -> tuple[str, ...]:
    return (
        f"model.family={family}",
        f"model.vision={json.dumps({'config': tower})}",
        f"model.connector={json.dumps(connector)}",
    )


#: their towers have an attention that keeps something else on a CPU
PROJECTED = {
    "perceiver": projected("perceiver", tiny.CLIP, tiny.PERCEIVER),
    "prefix": projected("prefix", tiny.SIGLIP, tiny.PREFIX),
}


@pytest.mark.parametrize("family", [*FAMILIES, *PROJECTED])
def test_all_families_are_estimated_too(family: str, tmp_path: Path) -> None:
    found = run(tmp_path, "data.augment={}", *(FAMILIES | PROJECTED)[family])
    assert 0 < found.model_flops < found.hardware_flops and found.step_s > 0
    assert found.fits["zero2"].activations > 0


def test_an_autoencoder_that_makes_latents_lies_beside_the_model(tmp_path: Path) -> None:
    name = test_latent.save_autoencoder(tmp_path)
    keys = {"latent_size": tiny.SIZE // 2, "autoencoder": name}
    recipe = helpers.recipe(
        tmp_path, "model.family=foveated_latent", f"model.connector={json.dumps(keys)}"
    )
    sizes = _sizes(_meta_model(recipe, 300), recipe)
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
    return _advice(chosen, fits, helpers.recipe(Path("unused"), *overrides), hardware)


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
