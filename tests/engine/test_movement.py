import os

import pytest
import torch

from tests.distributed import ranks
from tests.engine import engines
from tests.models import tiny
from vlm.config import COMPONENTS, Recipe
from vlm.engine import movement
from vlm.engine.movement import MovementCheck
from vlm.engine.step import train_step

CPU = torch.device("cpu")


def shift(module: torch.nn.Module) -> None:
    """Moves one weight of a module; under ZeRO-3 this rank's share of it."""
    parameter = next(module.parameters())
    held = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
    with torch.no_grad():
        held.view(-1)[0] += 1


@pytest.mark.parametrize("component", COMPONENTS)
def test_checksums_see_one_weight_of_each_component(component: str) -> None:
    model = tiny.make_model()
    before = movement.checksums(model)
    shift(getattr(model, component))
    after = movement.checksums(model)
    assert [name for name in COMPONENTS if before[name] != after[name]] == [component]


def test_it_waits_for_each_part_and_is_then_content() -> None:
    model = tiny.make_model()
    check = MovementCheck(model, ["connector", "language"], CPU)
    check.after_step()
    shift(model.connector)
    check.after_step()
    assert not check.done
    shift(model.language)
    check.after_step()
    assert check.done


def test_what_must_not_move() -> None:
    model = tiny.make_model()
    check = MovementCheck(model, ["connector", "language"], CPU)
    shift(model.vision)
    with pytest.raises(RuntimeError, match="moved vision"):
        check.after_step()


def test_what_never_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movement, "PATIENCE_STEPS", 3)
    model = tiny.make_model()
    check = MovementCheck(model, ["connector", "language"], CPU)
    shift(model.connector)
    check.after_step()
    check.after_step()
    with pytest.raises(RuntimeError, match="language did not move in 3 steps"):
        check.after_step()


def train_and_tamper(stage: int, recipe: Recipe) -> tuple[bool, bool, str]:
    """Whether it was done before and after a step, and what it says of a tampered rank."""
    engine = engines.make_engine(stage, recipe, engines.make_model())
    check = MovementCheck(engine.module, ["connector", "language"], engine.device)
    before = check.done
    train_step(engine, engines.mine(engines.micro_batches(0)))
    check.after_step()
    tampered = MovementCheck(engine.module, ["connector", "language"], engine.device)
    if os.environ["RANK"] == "1":
        shift(engine.module.vision)
    try:
        tampered.after_step()
    except RuntimeError as error:
        return before, check.done, str(error)
    return before, check.done, "nothing"


@pytest.mark.parametrize("stage", [2, 3])
def test_on_ranks_one_that_moves_is_seen_by_all(stage: int) -> None:
    found = ranks(2).run(train_and_tamper, stage, engines.recipe("model.freeze=[vision]"))
    complaint = "training moved vision, but only ['connector', 'language'] train"
    assert found == [(False, True, complaint)] * 2
