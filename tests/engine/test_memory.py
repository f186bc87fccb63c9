"""Bytes against the tensors of engines that train, on one rank and on two, in every stage."""

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import ranks
from tests.engine import engines
from tests.train import helpers
from vlm.config import Recipe
from vlm.engine import ds_config, memory, optim
from vlm.engine.setup import build_engine
from vlm.engine.step import train_step

#: small, so that a rank's share of communication is not all there is; laid out as on a GPU
BUCKETS = {
    "reduce_bucket_size": 20_000,
    "allgather_bucket_size": 20_000,
    "contiguous_gradients": True,
}


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors(one)
    elif isinstance(value, Iterable) and not isinstance(value, str):
        for one in value:
            yield from tensors(one)


def storages(*values: Any) -> dict[int, int]:
    """Bytes of what lies behind tensors, each memory once."""
    return {
        storage.data_ptr(): storage.nbytes()
        for value in values
        for tensor in tensors(value)
        if (storage := tensor.untyped_storage()).nbytes()
    }


def held(engine: Any) -> dict[str, dict[int, int]]:
    """Memory of an engine by what it is for. Nothing is counted twice."""
    parameters = list(engine.module.parameters())
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    adam = zero.optimizer if stage else zero
    weights = [parameters]
    gradients: list[Any] = [[p.grad for p in parameters]]
    masters: list[Any] = [adam.state]
    if stage in (1, 2):
        masters.append(zero.single_partition_of_fp32_groups)
        gradients += [zero.averaged_gradients, zero.all_grad_tensors]
        gradients.append([p.grad_accum for p in parameters if hasattr(p, "grad_accum")])
    elif stage == 3:
        weights.append([p.ds_tensor for p in parameters])
        masters.append(zero.fp32_partitioned_groups_flat)
        gradients.append(zero.grad_partitions_flat_buffer)
    found = {"weights": storages(*weights)}
    for name, values in (("optimizer", masters), ("gradients", gradients)):
        known = {key for part in found.values() for key in part}
        found[name] = {k: v for k, v in storages(*values).items() if k not in known}
    return found


def configuration(stage: str, half: bool, world_size: int) -> dict[str, Any]:
    config = helpers.resolved(stage, world_size, len(engines.EIGHT))
    config["bf16"] = {"enabled": half}
    config["data_types"] = {"grad_accum_dtype": "bf16" if half and stage == "1" else "fp32"}
    config["zero_optimization"] |= BUCKETS
    return config


def train(stage: str, half: bool, recipe: Recipe) -> dict[str, int]:
    """Bytes after a step, and those of gradients before the last micro-batch of the next."""
    config = configuration(stage, half, torch.distributed.get_world_size())
    engine = build_engine(engines.make_model(), recipe, config, cpu=True)
    batches = engines.mine(engines.micro_batches(0, engines.EIGHT))
    train_step(engine, batches)
    found = {name: sum(part.values()) for name, part in held(engine).items()}
    for batch in batches[:2]:
        engine.set_gradient_accumulation_boundary(False)
        engine.backward(engine(batch).loss_sum * 1e-3, scale_wrt_gas=False)
        engine.step()
    found["gradients"] = sum(held(engine)["gradients"].values())
    return found


def expected(stage: str, half: bool, recipe: Recipe, world_size: int) -> memory.StateBytes:
    config = configuration(stage, half, world_size)
    model = engines.make_model()
    optim.freeze(model, recipe.model)
    return memory.state_bytes(memory.sizes_of(model, recipe.optim), config, world_size)


def check(stages: list[tuple[str, bool]], recipe: Recipe, world_size: int) -> None:
    for stage, half in stages:
        found = ranks(world_size).run(train, stage, half, recipe)
        worst = {name: max(rank[name] for rank in found) for name in found[0]}
        right = expected(stage, half, recipe, world_size)
        assert (worst["weights"], worst["optimizer"]) == (right.weights, right.optimizer), stage
        # no gradient reaches the tower's mask token, and autograd's may be views of a little more
        assert worst["gradients"] == pytest.approx(right.gradients, rel=3e-3), stage


def test_states_of_one_rank() -> None:
    check([("0", False), ("1", True), ("2", False), ("3", True)], engines.recipe(), 1)


def test_states_of_two_ranks_and_a_frozen_part() -> None:
    stages = [("0", False), *((stage, half) for stage in "123" for half in (False, True))]
    check(stages, engines.recipe("model.freeze=[vision]"), 2)


def test_what_is_offloaded_lies_on_the_host() -> None:
    recipe = engines.recipe()
    for stage in ("2", "3"):
        kept = expected(stage, True, recipe, 2)
        moved = expected(f"{stage}_offload", True, recipe, 2)
        assert (moved.optimizer, moved.gradients) == (0, 0)
        assert moved.weights <= kept.weights
        assert moved.host > kept.optimizer + kept.gradients


def test_every_stage_of_a_file() -> None:
    config = {**helpers.resolved(3, 2), "bf16": {"enabled": True}}
    found = memory.variants(config)
    assert list(found) == ["zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]
    for name, one in found.items():
        assert one["zero_optimization"]["stage"] == int(name[4])
        assert ("offload_optimizer" in one["zero_optimization"]) == name.endswith("offload")
        ds_config._check_precision(one, helpers.ds_file(3), False)  # none that trains wrongly
    sizes = memory.Sizes(groups=((1000, 24), (7,)), frozen=(4096,))
    total = {name: memory.state_bytes(sizes, one, 4) for name, one in found.items()}
    assert total["zero0"].optimizer > 2 * total["zero1"].optimizer
    assert total["zero2"].weights == 2 * (1024 + 8 + 4096)
