"""Norms of components against plain autograd, and steps that must not be applied."""

import math

import numpy as np
import pytest
import torch

from tests.distributed import ranks
from tests.engine import engines
from vlm.config import Recipe
from vlm.config_model import COMPONENTS
from vlm.engine.step import StepResult, read, train_step

STAGES = [0, 1, 2, 3, "2_offload", "3_offload"]


def expected() -> dict[str, float]:
    """One process, one flat batch."""
    model = engines.make_model()
    batch = engines.flat_batch(0)
    (model(batch).loss_sum / batch.num_loss_tokens).backward()
    squares = dict.fromkeys(COMPONENTS, 0.0)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            squares[name.partition(".")[0]] += float(parameter.grad.double().square().sum())
    return {name: math.sqrt(square) for name, square in squares.items()}


def one_step(stage: int | str, recipe: Recipe) -> StepResult:
    engine = engines.make_engine(stage, recipe, engines.make_model())
    return read(train_step(engine, engines.mine(engines.micro_batches(0))))


@pytest.mark.parametrize("stage", STAGES)
def test_norms_of_components(stage: int | str) -> None:
    for result in ranks(2).run(one_step, stage, engines.recipe()):
        assert result.grad_norms == pytest.approx(expected(), rel=1e-3)
        assert result.grad_norm == pytest.approx(math.hypot(*expected().values()), rel=1e-3)


def test_what_is_frozen_has_none() -> None:
    (result,) = ranks(1).run(one_step, 2, engines.recipe("model.freeze=[vision]"))
    assert "vision" not in result.grad_norms
    assert result.grad_norms["language"] > 0


def spoil(module: torch.nn.Module, args: tuple, out: torch.Tensor) -> None:
    out.register_hook(lambda grad: grad * math.nan)


def left_out(stage: int | str, recipe: Recipe, poison: bool) -> list:
    """A step that is left out between two that are not: losses, and whether weights moved."""
    engine = engines.make_engine(stage, recipe, engines.make_model())
    found = []
    for step, limit in enumerate([math.inf, 0.5, math.inf]):
        before = engines.weights(engine)
        batches = engines.mine(engines.micro_batches(step))
        if poison:
            limit = math.inf
        if poison and step == 1 and torch.distributed.get_rank() == 1:
            handle = engine.module.connector.register_forward_hook(spoil)
            result = read(train_step(engine, batches, loss_limit=limit))
            handle.remove()
        else:
            result = read(train_step(engine, batches, loss_limit=limit))
        after = engines.weights(engine)
        moved = any(not np.array_equal(before[name], after[name]) for name in after)
        rates = [group["lr"] for group in engine.optimizer.param_groups]
        found.append((result.applied, moved, result.grad_norm, result.losses["loss"], rates))
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("poison", [False, True])
def test_a_step_is_left_out_on_all_ranks(stage: int, poison: bool) -> None:
    """For its loss, or for a gradient that is not finite on one rank."""
    recipe = engines.recipe("optim.schedule.name=cosine")
    found, other = ranks(2).run(left_out, stage, recipe, poison)
    assert [row[0] for row in found] == [row[0] for row in other] == [True, False, True]
    assert [row[1] for row in found] == [True, False, True]
    assert found[1][2] == math.inf and math.isfinite(found[2][2])
    assert all(math.isfinite(row[3]) for row in found)
