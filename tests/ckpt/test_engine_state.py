"""Elastic: what some ranks saved, other numbers of ranks and other stages go on with."""

import functools
import signal
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.ckpt.test_pieces import built
from tests.distributed import ranks
from tests.train import helpers, runs
from vlm import dist
from vlm.ckpt.engine_state import (
    Counters,
    counters,
    load_pieces,
    set_counters,
    state_file,
    write_pieces,
)
from vlm.ckpt.pieces import base_optimizer
from vlm.config import Recipe
from vlm.data.plan.plan import Position
from vlm.engine.step import StepResult, read, train_step
from vlm.errors import CheckpointError
from vlm.train import loop
from vlm.train.preempt import Preemption

#: dropout differs between ranks, so it differs between numbers of them
STEADY = ("model.vision.config.drop_path_rate=0", "model.language.config.attention_dropout=0")


def stop_at(step: int, recipe: Recipe, stage: int) -> list[runs.Step]:
    """Trains until ``step`` is saved, then goes the way of a preemption, agreed at once."""
    preemption = Preemption()
    agreed = functools.partial(preemption.agreed, now=True)
    with pytest.MonkeyPatch.context() as patch:
        advance = loop._advance

        def noted(state: Any, *rest: Any) -> None:
            advance(state, *rest)
            if state.step == step:
                preemption._caught.add(signal.SIGTERM)

        patch.setattr(loop, "_advance", noted)
        patch.setattr(preemption, "agreed", agreed)
        patch.setattr(runs, "Preemption", lambda _: preemption)
        return runs.fit(recipe, stage)


def keys(steps: list[list[runs.Step]]) -> list[set[str]]:
    """Samples of every step, of all ranks."""
    by_step = zip(*steps, strict=True)
    return [{k for rank in step for batch in rank.keys for k in batch} for step in by_step]


def test_ranks_come_and_go() -> None:
    """Stopped on 4, on at 2, at 1 in another stage, and back at 4: the same samples and losses."""
    whole = ranks(4).run(runs.fit, helpers.recipe(runs.new_folder(), *STEADY), 2)
    recipe = helpers.recipe(runs.new_folder(), *STEADY)
    parts = [
        ranks(4).run(stop_at, 2, recipe, 2),
        ranks(2).run(stop_at, 3, recipe, 2),
        ranks(1).run(stop_at, 4, recipe, 3),
        ranks(4).run(runs.fit, recipe, 1),
    ]
    assert [len(part[0]) for part in parts] == [2, 1, 1, 2]
    assert [k for part in parts for k in keys(part)] == keys(whole)
    found = [step.result for part in parts for step in part[0]]
    for one, other in zip(found, whole[0], strict=True):
        assert one.losses == pytest.approx(other.result.losses, rel=1e-4)
        assert one.grad_norm == pytest.approx(other.result.grad_norm, rel=1e-3)


Tensors = dict[str, torch.Tensor]


def trained_state(recipe: Recipe, stage: int, folder: Path, num_steps: int) -> Counters:
    """Trains some steps, writes, and returns the counters."""
    run = loop.build_run(
        recipe, helpers.resolved(stage, dist.world_size()), runs.machine(), Preemption()
    )
    engine = run.engine
    steps = run.steps(run.train, Position())
    for _ in range(num_steps):
        train_step(engine, next(steps).batches)
    steps.close()
    write_pieces(engine, folder)
    return counters(engine)


def reloaded(recipe: Recipe, stage: int, folder: Path, num: int, found: Counters, to: Path) -> list:
    """Loads, writes again, and returns learning rates."""
    engine = built(recipe, stage)
    load_pieces(engine, [folder / state_file(rank) for rank in range(num)])
    set_counters(engine, found)
    # stage 0 scales no loss
    assert replace(counters(engine), loss_scaler={}) == replace(found, loss_scaler={})
    write_pieces(engine, to)
    return [group["lr"] for group in base_optimizer(engine).param_groups]


def joined(folder: Path) -> Tensors:
    """All pieces put together by their starts, without the code under test."""
    parts: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
    for path in folder.glob("*.safetensors"):
        for key, tensor in load_file(path).items():
            kind, start, name = key.split("/", 2)
            parts.setdefault((kind, name), {})[int(start)] = tensor
    return {
        "/".join(key): torch.cat([pieces[start] for start in sorted(pieces)])
        for key, pieces in parts.items()
    }


@pytest.mark.parametrize("stages", [(2, 3), (3, 1), (1, 0), (0, 2)])
def test_every_bit_moves_between_stages_and_ranks(stages: tuple[int, int], tmp_path: Path) -> None:
    """Weights and moments of 2 ranks, loaded on 1 in another stage and written again."""
    recipe = helpers.recipe(runs.new_folder(), "model.freeze=[vision]", "optim.lr.vision=0")
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    after.mkdir()
    found, _ = ranks(2).run(trained_state, recipe, stages[0], before, 2)
    (rates,) = ranks(1).run(reloaded, recipe, stages[1], before, 2, found, after)
    first, second = joined(before), joined(after)
    assert first.keys() == second.keys()
    assert {key.split("/")[0] for key in first} == {"weight", "exp_avg", "exp_avg_sq"}
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key
    # two of six steps done, the third of the warm-up's two is the peak
    assert set(rates) == {2e-3, 3e-3}


def third_step_twice(
    recipe: Recipe, stage: int | str, precision: str, folder: Path
) -> tuple[StepResult, StepResult]:
    """After two steps: the next one, and the same one in a fresh engine that loads them."""
    config = helpers.resolved(stage, dist.world_size())
    if precision != "fp32":
        config[precision] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "bf16" if stage == 1 else "fp32"}

    def run() -> loop.Run:
        found = loop.build_run(recipe, config, runs.machine(), Preemption())
        found.engine.train()
        return found

    def step(engine: Any) -> StepResult:
        torch.manual_seed(7)  # of dropout
        return read(train_step(engine, batches[2]))

    first = run()
    with closing(first.steps(first.train, Position())) as steps:
        batches = [next(steps).batches for _ in range(3)]
    for index in range(2):
        train_step(first.engine, batches[index])
    write_pieces(first.engine, folder)
    found = counters(first.engine)
    expected = step(first.engine)
    second = run().engine
    load_pieces(second, [folder / state_file(rank) for rank in range(dist.world_size())])
    set_counters(second, found)
    return expected, step(second)


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (1, "bf16"),
        (2, "bf16"),
        (3, "bf16"),
        ("2_offload", "fp32"),
        ("3_offload", "fp32"),
    ],
)
def test_every_precision_and_offload_goes_on_bit_for_bit(
    stage: int | str, precision: str, tmp_path: Path
) -> None:
    recipe = helpers.recipe(runs.new_folder())
    for expected, found in ranks(2).run(third_step_twice, recipe, stage, precision, tmp_path):
        assert found == expected


def refusal(recipe: Recipe, folder: Path, num: int) -> str:
    engine = built(recipe, 2)
    try:
        load_pieces(engine, [folder / state_file(rank) for rank in range(num)])
    except CheckpointError as error:
        return str(error)
    return "nothing"


def test_a_part_that_is_missing_stops_all_ranks(tmp_path: Path) -> None:
    recipe = helpers.recipe(runs.new_folder())
    ranks(2).run(trained_state, recipe, 2, tmp_path, 1)
    assert ranks(2).run(refusal, recipe, tmp_path, 2) == ["nothing"] * 2
    for message in ranks(2).run(refusal, recipe, tmp_path, 1):
        assert "of the elements" in message and "expected all of them" in message
    (tmp_path / state_file(1)).write_bytes(b"\x80\x04K\x01.")
    for message in ranks(2).run(refusal, recipe, tmp_path, 2):
        assert "state_00001.safetensors" in message and "expected safetensors" in message
