from collections import Counter
from collections.abc import Callable
from weakref import WeakSet

import pytest
import torch

from tests.distributed import ranks
from tests.engine import engines
from tests.models import tiny
from tests.train import helpers, runs
from vlm.config import Recipe
from vlm.engine.step import train_step
from vlm.engine.thaw import adam_states, adapt

UNTIL = 2


def rest_and_thaw(stage: int, recipe: Recipe) -> list[dict]:
    """By step: what began, whether vision took a gradient, Adam's counts by component."""
    engine = engines.make_engine(stage, recipe, engines.make_model())
    seen = []
    for step in range(4):
        began = adapt(engine, recipe.model, step)
        trains = {p.requires_grad for p in engine.module.vision.parameters()}
        train_step(engine, engines.mine(engines.micro_batches(step)))
        counts = {}
        for part, state in adam_states(engine):
            counts.setdefault(part, set()).add(float(state["step"]))
        seen.append({"began": began, "trains": trains, "counts": counts})
    return seen


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_part_rests_and_then_begins_as_in_a_run_of_its_own(stage: int) -> None:
    recipe = engines.recipe(f"model.freeze.vision={UNTIL}")
    for seen in ranks(2).run(rest_and_thaw, stage, recipe):
        assert [step["began"] for step in seen] == [set(), set(), {"vision"}, set()]
        assert [step["trains"] for step in seen] == [{False}, {False}, {True}, {True}]
        for index, step in enumerate(seen):
            assert step["counts"]["language"] == {index + 1}
        assert [step["counts"]["vision"] for step in seen[UNTIL:]] == [{1}, {2}]


class Kept:
    """A tensor that autograd keeps, for as long as it does."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def kept_by(function: Callable[[], object]) -> int:
    """Tensors that are kept for a backward pass when ``function`` has returned."""
    kept: WeakSet[Kept] = WeakSet()

    def keep(tensor: torch.Tensor) -> Kept:
        one = Kept(tensor)
        kept.add(one)
        return one

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one.tensor):
        result = function()
    count = len(kept)
    del result  # not earlier: the graph hangs on it
    return count


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_tower_keeps_nothing(checkpointing: bool) -> None:
    model = tiny.make_model().train()
    model.vision.gradient_checkpointing = checkpointing
    frames = tiny.make_batch([(3, 4)]).frames
    assert kept_by(lambda: model.vision(frames)) > 0
    model.vision.requires_grad_(False)
    assert kept_by(lambda: model.vision(frames)) == 0


@pytest.mark.parametrize("part", ["vision", "connector", "language"])
def test_checkpointing_of_one_part_keeps_less_and_changes_nothing(part: str) -> None:
    batch = tiny.make_batch([(3, 6), (2, 5)])
    found = []
    for checkpointing in (False, True):
        model = tiny.make_model().train()
        if checkpointing and part == "language":
            model.language.lm.gradient_checkpointing_enable({"use_reentrant": False})
        elif checkpointing:
            getattr(model, part).gradient_checkpointing = True
        kept = kept_by(lambda model=model: model(batch))
        model(batch).loss_sum.backward()
        found.append((kept, [p.grad for p in model.parameters() if p.grad is not None]))
    (more, plain), (fewer, recomputed) = found
    assert fewer < 0.8 * more
    torch.testing.assert_close(recomputed, plain, rtol=1e-12, atol=1e-13)


def optimizer_state(stage: int, recipe: Recipe) -> Counter:
    """Numbers of Adam's first moment that this rank holds, by component."""
    engine = engines.make_engine(stage, recipe, engines.make_model())
    train_step(engine, engines.mine(engines.micro_batches(0)))
    held: Counter = Counter()
    for part, state in adam_states(engine):
        held[part] += state["exp_avg"].numel()
    return held


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_frozen_for_good_has_no_optimizer_state(stage: int) -> None:
    recipe = engines.recipe("model.freeze=[vision, language]")
    held = ranks(2).run(optimizer_state, stage, recipe)
    assert [set(one) for one in held] == [{"connector"}] * 2
    expected = sum(p.numel() for p in engines.make_model().connector.parameters())
    # shares are padded to one size
    assert expected <= sum(one.total() for one in held) <= 1.02 * expected


@pytest.mark.parametrize(
    ("stage", "thaws"),
    [
        (1, (4,)),
        (2, (2, helpers.EVERY, 4)),
        pytest.param(1, (2, helpers.EVERY), marks=pytest.mark.slow),
        pytest.param(3, (2, helpers.EVERY, 4), marks=pytest.mark.slow),
    ],
)
def test_a_resume_before_or_after_the_thaw_goes_on_bit_for_bit(
    stage: int, thaws: tuple[int, ...]
) -> None:
    """A run of six steps saves after three: the part thaws before, at that step, or later."""
    for until in thaws:
        changes = (f"model.freeze.vision={until}", "optim.lr_at.4.language=1e-4")
        recipe = helpers.recipe(runs.new_folder(), *changes)
        whole = ranks(2).run(runs.fit, recipe, stage)
        last = runs.checkpoint(recipe, helpers.STEPS)
        (last / "COMPLETE").unlink()
        resumed = ranks(2).run(runs.fit, recipe, stage)
        for before, after in zip(whole, resumed, strict=True):
            assert len(after) == helpers.STEPS - helpers.EVERY
            assert [step.result for step in after] == [s.result for s in before[helpers.EVERY :]]
