"""On two ranks and in every stage: pieces cover every parameter once, and are the engine's own."""

from typing import Any

import pytest
import torch

from tests.distributed import ranks
from tests.train import helpers, runs
from vlm.ckpt.pieces import pieces
from vlm.config import Recipe
from vlm.train import loop
from vlm.train.preempt import Preemption

Found = list[tuple[str, int, list[float], bool, bool]]


def built(recipe: Recipe, stage: int) -> Any:
    machine = runs.machine()
    resolved = helpers.resolved(stage, machine.world_size)
    return loop.build_run(recipe, resolved, machine, Preemption()).engine


def held(recipe: Recipe, stage: int) -> tuple[Found, dict[str, torch.Tensor]]:
    """This rank's pieces, and the whole weights as DeepSpeed gathers them."""
    engine = built(recipe, stage)
    found = [
        (p.name, p.start, p.view(p.memory).tolist(), p.trained, p.replicated)
        for p in pieces(engine)
    ]
    if stage == 3:
        whole = engine._zero3_consolidated_16bit_state_dict() or {}
    else:
        whole = engine.module.state_dict()
    return found, {name: tensor.clone() for name, tensor in whole.items()}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_pieces_are_the_whole_model(stage: int) -> None:
    recipe = helpers.recipe(runs.new_folder(), "model.freeze=[vision]")
    (first, whole), (second, _) = ranks(2).run(held, recipe, stage)
    parts: dict[str, dict[int, list[float]]] = {}
    for name, start, values, trained, replicated in [*first, *second]:
        assert trained == (not name.startswith("vision."))
        before = parts.setdefault(name, {}).get(start)
        assert before is None or (replicated and before == values)
        parts[name][start] = values
    head, table = "language.lm.lm_head.weight", "language.lm.model.embed_tokens.weight"
    assert torch.equal(whole.pop(head), whole[table])  # tied: held once
    assert parts.keys() == whole.keys()
    for name, pieces_of in parts.items():
        joined = [value for start in sorted(pieces_of) for value in pieces_of[start]]
        assert joined == whole[name].flatten().tolist(), name
    if stage:
        assert sum(len(p) > 1 for p in parts.values()) > 0  # some are cut


def after_writing(recipe: Recipe, stage: int) -> bool:
    engine = built(recipe, stage)
    piece = next(p for p in pieces(engine) if p.trained)
    piece.view(piece.memory).fill_(7.0)
    return bool((next(p for p in pieces(engine)).view(piece.memory) == 7).all())


def test_a_view_is_the_engines_memory() -> None:
    assert ranks(1).run(after_writing, helpers.recipe(runs.new_folder()), 2) == [True]
