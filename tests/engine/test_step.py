"""One global step, however it is split: DeepSpeed on real ranks against plain torch."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch

from tests.distributed import ranks
from tests.engine import engines
from tests.engine.engines import EIGHT, MICRO_BATCHES, MODALITIES, Shapes
from vlm.config import Recipe
from vlm.engine import optim, thaw
from vlm.engine.modes import forward_mode
from vlm.engine.step import StepResult, eval_step, read, train_step
from vlm.models.foveated import FoveatedModel

STEPS = 3
#: float32: plain torch differs from itself in float64 by a fifth of this; an update is about 1e-3
LOSS = {"rtol": 2e-4}
NORM = {"rtol": 1e-3}
ATOL = 5e-6


class Trained(NamedTuple):
    results: list[StepResult]
    weights: dict[str, np.ndarray]
    eval_losses: dict[str, float]


def train(
    stage: int | str,
    recipe: Recipe,
    coarse_weight: float = 0.5,
    shapes: Shapes = MICRO_BATCHES,
    make: Callable = engines.make_model,
) -> Trained:
    """On each rank."""
    engine = engines.make_engine(stage, recipe, make(coarse_weight), len(shapes))
    results = []
    for step in range(STEPS):
        batches = engines.micro_batches(step, shapes)
        # every other step backwards, so that each rank meets each kind
        mine = engines.mine(batches[:: 1 if step % 2 else -1])
        thaw.adapt(engine, recipe.model, step)
        mode = forward_mode(recipe, step)
        results.append(read(train_step(engine, mine, mode=mode, agree=step == 0)))
    sums, tokens = eval_step(engine, [engines.flat_batch(0, shapes)])
    return Trained(
        results, engines.weights(engine), {name: value / tokens for name, value in sums.items()}
    )


def reference(
    recipe: Recipe,
    coarse_weight: float = 0.5,
    shapes: Shapes = MICRO_BATCHES,
    make: Callable = engines.make_model,
) -> Trained:
    """One process, one flat batch a step, an AdamW and clipping of torch for each component."""
    model = make(coarse_weight)
    optimizers = {}
    results = []
    for step in range(STEPS):
        for name in optim.COMPONENTS:
            until = recipe.model.freeze.get(name, 0)
            getattr(model, name).requires_grad_(until is not None and step >= until)
        if make is engines.make_lora_model:
            for name, parameter in model.language.named_parameters():
                parameter.requires_grad_("lora" in name)
        batch = engines.flat_batch(step, shapes)
        mode = forward_mode(recipe, step)
        output = model(batch, **({} if mode is None else {"mode": mode}))
        (output.loss_sum / batch.num_loss_tokens).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        for group in optim.parameter_groups(model, recipe.optim):
            name = group.pop("name")
            if name not in optimizers:
                config = recipe.optim
                group |= {"betas": config.betas, "eps": config.eps}
                optimizers[name] = torch.optim.AdamW([group], lr=0.0)
            part = name.removesuffix("_no_decay")
            rate = getattr(recipe.optim.lr, part)
            for start, rates in sorted(recipe.optim.lr_at.items()):
                rate = rates.get(part, rate) if step >= start else rate
            warmup = min(1.0, (step + 1) / math.ceil(0.3 * recipe.train.steps))
            optimizers[name].param_groups[0]["lr"] = rate * warmup
            optimizers[name].step()
        model.zero_grad()
        sums = {"loss": output.loss_sum, **output.parts}
        losses = {
            name: float(value.detach()) / batch.num_loss_tokens for name, value in sums.items()
        }
        results.append(StepResult(losses, [], norm, {}, {}, batch.num_loss_tokens, 0, True))
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    return Trained(results, weights, eval_losses(model, shapes))


@torch.no_grad()
def eval_losses(model: FoveatedModel, shapes: Shapes) -> dict[str, float]:
    batch = engines.flat_batch(0, shapes)
    output = model(batch, measure_all=True)
    sums = {"loss": output.loss_sum, **output.parts}
    return {name: float(value.detach()) / batch.num_loss_tokens for name, value in sums.items()}


def check_equal(found: list[Trained], expected: Trained, atol: float = ATOL) -> None:
    for trained in found:
        for one, other in zip(trained.results, expected.results, strict=True):
            assert one.losses.keys() == other.losses.keys()
            for name in one.losses:
                np.testing.assert_allclose(one.losses[name], other.losses[name], **LOSS)
            assert one.num_loss_tokens == other.num_loss_tokens
            assert one.applied
            np.testing.assert_allclose(one.grad_norm, other.grad_norm, **NORM)
            assert one.grad_norm > 1  # else clipping is not tested
        assert trained.results == found[0].results, "ranks differ"
        for name, value in trained.eval_losses.items():
            np.testing.assert_allclose(value, expected.eval_losses[name], **LOSS)
    weights = found[0].weights
    assert weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        np.testing.assert_allclose(weights[name], value, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_any_split_is_one_flat_batch_of_plain_torch(stage: int, world_size: int) -> None:
    recipe = engines.recipe()
    found = ranks(world_size).run(train, stage, recipe, 0.5)
    check_equal(found, reference(recipe, 0.5))


@pytest.mark.parametrize("stage", [2, 3])
def test_frozen_parts_and_a_coarse_pass_without_loss(stage: int) -> None:
    recipe = engines.recipe("model.freeze=[vision]")
    found = ranks(2).run(train, stage, recipe, 0.0)
    check_equal(found, reference(recipe, 0.0))
    start = engines.make_model(0.0).state_dict()
    tower = [name for name in start if name.startswith("vision.")]
    assert tower
    for name in tower:
        assert np.array_equal(found[0].weights[name], start[name].numpy()), name


@pytest.mark.parametrize("stage", ["2_offload", "3_offload"])
def test_offload_is_plain_torch_too(stage: str) -> None:
    recipe = engines.recipe("model.freeze=[vision]")
    check_equal(ranks(2).run(train, stage, recipe), reference(recipe))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_with_text_only_images_only_and_video(stage: int) -> None:
    recipe = engines.recipe()
    found = ranks(3).run(train, stage, recipe, 0.5, MODALITIES)
    check_equal(found, reference(recipe, 0.5, MODALITIES))


@pytest.mark.parametrize(
    "world_size", [1, 2, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 8))]
)
def test_eight_micro_batches_on_any_number_of_ranks_are_one_big_batch(world_size: int) -> None:
    recipe = engines.recipe()
    found = ranks(world_size).run(train, 2, recipe, 0.5, EIGHT)
    check_equal(found, reference(recipe, 0.5, EIGHT))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_part_that_thaws_and_rates_that_change(stage: int) -> None:
    """Against an optimizer of its own for each component, which begins when it begins to train."""
    recipe = engines.recipe("model.freeze.vision=2", "optim.lr_at.1.language=1e-3")
    found = ranks(2).run(train, stage, recipe)
    # the first update of a part follows gradients that have drifted by now; one with a stale count
    # of steps would be three times as large
    check_equal(found, reference(recipe), 4 * ATOL)


@pytest.mark.parametrize("stage", [1, 2, 3, "2_offload"])
def test_modes_that_change_from_step_to_step(stage: int | str) -> None:
    """What one mode does not use gets no gradient left over from another."""
    recipe = engines.recipe("train.modes={coarse_fine: 1, coarse_only: 1}", "seed=17")
    modes = [forward_mode(recipe, step) for step in range(STEPS)]
    assert modes == ["coarse_fine", "coarse_only", "coarse_fine"]
    check_equal(ranks(2).run(train, stage, recipe), reference(recipe))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_adapters_train_and_what_they_adapt_does_not(stage: int) -> None:
    make = engines.make_lora_model
    recipe = engines.recipe("model.freeze=[vision]")
    found = ranks(2).run(train, stage, recipe, 0.5, MICRO_BATCHES, make)
    check_equal(found, reference(recipe, 0.5, MICRO_BATCHES, make))


def overflow(recipe: Recipe) -> tuple[StepResult, float]:
    """What became of a step without finite gradients, and the rate of the next."""
    model = engines.make_model()
    with torch.no_grad():
        model.connector.q_init.weight.fill_(math.inf)
    bf16 = {"enabled": True}
    engine = engines.make_engine(2, recipe, model, bf16=bf16)
    before = engine.module.state_dict()["connector.dino_to_llm.weight"].clone()
    result = read(train_step(engine, engines.micro_batches(0)))
    after = engine.module.state_dict()["connector.dino_to_llm.weight"]
    assert torch.equal(before, after)
    rates = {group["name"]: group["lr"] for group in engine.optimizer.param_groups}
    return result, rates["language"]


def test_a_step_that_deepspeed_skips_is_not_applied_and_still_counts() -> None:
    recipe = engines.recipe("optim.lr_at.1.language=0.5")
    ((result, rate),) = ranks(1).run(overflow, recipe)
    assert not result.applied
    assert rate == pytest.approx(0.5)  # the warmup of ceil(0.3 * 6) = 2 steps is over
