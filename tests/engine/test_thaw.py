import pytest
import torch

from tests.distributed import ranks
from tests.engine import engines
from tests.models import tiny
from tests.train import helpers, runs
from vlm.config import Recipe
from vlm.engine import optim
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


def kept_by(function) -> int:
    """Tensors that autograd keeps for the backward pass."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function()
    return len(kept)


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
    torch.testing.assert_close(recomputed, plain, rtol=1e-12, atol=0)


def test_what_is_frozen_for_good_has_no_optimizer_state() -> None:
    recipe = engines.recipe("model.freeze=[vision, language]")
    model = engines.make_model()
    optim.freeze(model, recipe.model)
    adam, _ = optim.optimizer(model, recipe, fused=False)
    batch = engines.flat_batch(0)
    (model(batch).loss_sum / batch.num_loss_tokens).backward()
    adam.step()
    held = sum(state["exp_avg"].numel() for state in adam.state.values())
    assert held == sum(p.numel() for p in model.connector.parameters())
    assert all(p.grad is None for p in [*model.vision.parameters(), *model.language.parameters()])


@pytest.mark.parametrize("stage", [2, 3])
def test_a_resume_before_or_after_the_thaw_goes_on_bit_for_bit(stage: int) -> None:
    """A run of six steps saves after three: the part thaws at that step, or later."""
    for until in (2, helpers.EVERY, 4):
        changes = (f"model.freeze.vision={until}", "optim.lr_at.4.language=1e-4")
        recipe = helpers.recipe(runs.new_folder(), *changes)
        whole = ranks(2).run(runs.fit, recipe, stage)
        last = runs.checkpoint(recipe, helpers.STEPS)
        (last / "COMPLETE").unlink()
        resumed = ranks(2).run(runs.fit, recipe, stage)
        for before, after in zip(whole, resumed, strict=True):
            assert len(after) == helpers.STEPS - helpers.EVERY
            assert [step.result for step in after] == [s.result for s in before[helpers.EVERY :]]
