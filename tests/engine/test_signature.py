"""Ranks that go different ways: the same error on all of them, and no hang."""

import pytest
import torch

from tests.distributed import ranks
from tests.engine import engines
from tests.models import tiny
from vlm.batch import Batch
from vlm.config import Recipe
from vlm.engine.signature import END, RankMismatchError, explain
from vlm.engine.step import read, train_step
from vlm.models.foveated import FoveatedModel, Output


def test_the_first_call_that_differs_is_named_with_the_ranks() -> None:
    same = ("mode None", "vision.a(x)", "vision.b(x)", "connector.c(x)")
    message = explain([(*same, "language.d(x)", END), (*same, END), (*same, END)])
    assert "first in call 4" in message
    assert "rank 0 calls language.d(x) after [mode None] vision x2 connector x1" in message
    assert f"rank 1, 2 calls {END} after [mode None] vision x2 connector x1" in message
    assert "\n" not in message


def test_one_that_is_shorter_has_called_nothing_yet() -> None:
    assert "rank 1 calls nothing yet after [m] vision x1" in explain(
        [("m", "vision.a(x)", "language.b(x)"), ("m", "vision.a(x)")]
    )


class LooksTwice(FoveatedModel):
    """Runs the tower once more where there are frames: what happens when images and video are two
    calls and a rank has only one of them."""

    def forward(self, batch: Batch, **options) -> Output:
        output = super().forward(batch, **options)
        if batch.has_frames:
            again, _ = self.vision(batch.frames)
            output = output._replace(loss_sum=output.loss_sum + 0.0 * again.sum())
        return output


class SkipsText(FoveatedModel):
    """Calls no connector for text: equal shapes elsewhere hide it from the collectives."""

    def forward(self, batch: Batch, **options) -> Output:
        if batch.has_frames:
            return super().forward(batch, **options)
        hidden = self.language(self.language.embed(batch.input_ids), batch)
        loss = self.language.token_losses(hidden, batch).sum()
        return Output(loss, {"fine": loss, "coarse": loss})


def mismatch(stage: int, recipe: Recipe, kind: type) -> str:
    torch.manual_seed(0)
    config = tiny.make_config()
    engine = engines.make_engine(stage, recipe, kind(config).float().train(), 2)
    text, video = tiny.make_batch([(0, 5)]), tiny.make_batch([(3, 5)])
    batch = text if torch.distributed.get_rank() == 0 else video
    try:
        train_step(engine, [batch], agree=True)
    except RankMismatchError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("kind", [LooksTwice, SkipsText])
def test_ranks_that_call_different_modules_say_so(stage: int, kind: type) -> None:
    first, second = ranks(2).run(mismatch, stage, engines.recipe(), kind)
    assert first == second != "nothing"
    assert "rank 0 calls" in first and "rank 1 calls" in first
    if kind is LooksTwice:
        assert f"rank 0 calls {END}" in first
        assert "rank 1 calls vision(uint8[4] no grad) after" in first


def different_numbers(recipe: Recipe) -> str:
    """Of micro-batches."""
    engine = engines.make_engine(2, recipe, engines.make_model(), 4)
    batches = engines.micro_batches(0)[: 1 + torch.distributed.get_rank()]
    try:
        train_step(engine, batches, agree=True)
    except RankMismatchError as error:
        return str(error)
    return "nothing"


def test_ranks_with_different_numbers_of_micro_batches() -> None:
    for message in ranks(2).run(different_numbers, engines.recipe()):
        assert "micro-batch 0 of 1" in message and "micro-batch 0 of 2" in message


def with_and_without(recipe: Recipe) -> list[float]:
    losses = []
    for agree in (True, False):
        engine = engines.make_engine(2, recipe, engines.make_model())
        mine = engines.mine(engines.micro_batches(0))
        losses += [read(train_step(engine, mine, agree=agree)).losses["loss"] for _ in range(2)]
        assert not any(m._forward_pre_hooks for m in engine.module.modules() if not m._modules)
    return losses


def test_agreeing_changes_nothing_and_leaves_nothing_behind() -> None:
    first, second, third, fourth = ranks(2).run(with_and_without, engines.recipe())[0]
    assert (first, second) == (third, fourth)
