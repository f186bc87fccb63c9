import os
from pathlib import Path

import pytest
import torch

from tests.distributed import ranks
from tests.engine import engines
from tests.models import tiny
from vlm.config import Recipe
from vlm.config_model import COMPONENTS
from vlm.engine import movement
from vlm.engine.movement import MovementCheck
from vlm.engine.step import train_step

CPU = torch.device("cpu")
TRAINS = ["connector", "language"]


def model_without_vision() -> torch.nn.Module:
    model = tiny.make_model()
    model.vision.requires_grad_(False)
    return model


def shift(module: torch.nn.Module) -> None:
    """Moves one weight of a module; under ZeRO-3 this rank's share of it."""
    parameter = next(module.parameters())
    held = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
    with torch.no_grad():
        held.view(-1)[0] += 1


@pytest.mark.parametrize("component", COMPONENTS)
def test_checksums_see_one_weight(component: str) -> None:
    model = tiny.make_model()
    before = movement.checksums(model)
    shift(getattr(model, component))
    after = movement.checksums(model)
    differ = [name for name in before if before[name] != after[name]]
    assert [name.split(".")[0] for name in differ] == [component]


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
def test_a_checksum_is_the_sum_of_the_bits(kind: torch.dtype) -> None:
    model = torch.nn.Module()
    values = torch.arange(-3, 8).abs().to(kind)
    model.register_parameter("w", torch.nn.Parameter(values, requires_grad=False))
    size = values.element_size()
    raw = values.view(torch.uint8).numpy().tobytes()
    pieces = [raw[i : i + size] for i in range(0, len(raw), size)]
    expected = sum(int.from_bytes(piece, "little", signed=True) for piece in pieces)
    assert movement.checksums(model) == {"w": (expected + 2**63) % 2**64 - 2**63}


def test_it_waits_for_each_part_and_is_then_content(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_without_vision()
    check = MovementCheck(model, CPU)
    check.after_step(TRAINS)
    shift(model.connector)
    check.after_step(TRAINS)
    shift(model.language)
    check.after_step(TRAINS)
    monkeypatch.setattr(movement, "checksums", lambda model: pytest.fail("it looks again"))
    check.after_step(TRAINS)


def test_what_must_not_move() -> None:
    model = model_without_vision()
    check = MovementCheck(model, CPU)
    shift(model.vision)
    with pytest.raises(RuntimeError, match="moved vision"):
        check.after_step(TRAINS)


def test_what_must_not_move_within_a_part_that_trains() -> None:
    model = model_without_vision()
    model.language.lm.model.norm.requires_grad_(False)
    check = MovementCheck(model, CPU)
    shift(model.language.lm.model.norm)
    with pytest.raises(RuntimeError, match="moved language"):
        check.after_step(TRAINS)


def test_what_never_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movement, "PATIENCE_STEPS", 3)
    model = model_without_vision()
    check = MovementCheck(model, CPU)
    shift(model.connector)
    check.after_step(TRAINS)
    check.after_step(TRAINS)
    with pytest.raises(RuntimeError, match="language did not move in 3 steps"):
        check.after_step(TRAINS)


def test_a_part_that_thaws_is_waited_for_and_one_that_rests_may_have_moved() -> None:
    model = tiny.make_model()
    check = MovementCheck(model, CPU)
    shift(model.connector)
    check.after_step(["connector"])
    shift(model.connector)
    shift(model.vision)
    check.after_step(["vision"])
    shift(model.language)
    shift(model.vision)
    check.after_step(["vision"])  # it has seen all, and looks no more


def test_after_a_resume_the_past_proves_nothing() -> None:
    model = model_without_vision()
    check = MovementCheck(model, CPU)
    shift(model.vision)  # as loading does
    check.resumed()
    check.after_step(TRAINS)
    assert not check.unsaved


def saved(model: tiny.FoveatedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def test_files_hold_what_moved_and_what_did_not(tmp_path: Path) -> None:
    model = model_without_vision().float()
    check = MovementCheck(model, CPU)
    start = saved(model, tmp_path / "start")
    shift(model.connector)
    shift(model.language)
    check.after_step(TRAINS)
    assert check.unsaved
    with pytest.raises(RuntimeError, match="connector, language moved in training, and did not in"):
        check.after_save(start, TRAINS)
    check.after_save(saved(model, tmp_path / "good"), TRAINS)
    assert not check.unsaved
    shift(model.vision)
    with pytest.raises(RuntimeError, match=r"vision\.\S+ is frozen, and is not what the run start"):
        check.after_save(saved(model, tmp_path / "bad"), TRAINS)


def train_and_tamper(stage: int, recipe: Recipe, folder: Path) -> tuple[str, str]:
    """What is said of a good step and its files, and of a tampered rank."""
    engine = engines.make_engine(stage, recipe, engines.make_model())
    check = MovementCheck(engine.module, engine.device)
    train_step(engine, engines.mine(engines.micro_batches(0)))
    check.after_step(TRAINS)
    weights = engine._zero3_consolidated_16bit_state_dict() if stage == 3 else None
    if os.environ["RANK"] == "0":
        engine.module.save_pretrained(folder, state_dict=weights)
    tampered = MovementCheck(engine.module, engine.device)
    if os.environ["RANK"] == "1":
        shift(engine.module.vision)
    said = []
    for look in (
        lambda: check.after_save(folder, TRAINS),
        lambda: tampered.after_step(TRAINS),
    ):
        try:
            look()
            said.append("nothing")
        except RuntimeError as error:
            said.append(str(error))
    return said[0], said[1]


@pytest.mark.parametrize("stage", [2, 3])
def test_on_ranks_one_that_moves_is_seen_by_all(stage: int, tmp_path: Path) -> None:
    recipe = engines.recipe("model.freeze=[vision]")
    for files, tampered in ranks(2).run(train_and_tamper, stage, recipe, tmp_path):
        assert files == "nothing"
        assert tampered.startswith("training moved vision, but only ['connector', 'language'] tr")
