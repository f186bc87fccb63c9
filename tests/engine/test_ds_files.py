"""The files of ds_configs/: what they say, and that training with them is right on a CPU."""

import math
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm.engine import ds_config

FILES = sorted(Path(__file__).parents[2].glob("ds_configs/*.json"))


def resolved(path: Path, *, cpu: bool) -> dict[str, Any]:
    return ds_config.resolve(
        ds_config.load(path),
        path=path,
        recipe_path=Path("recipe.yaml"),
        micro_batches=4,
        world_size=1,
        cpu=cpu,
    )


def test_the_shipped_files_differ_only_where_their_names_say() -> None:
    trees = {path.stem: ds_config.load(path) for path in FILES}
    stages = {name: tree["zero_optimization"]["stage"] for name, tree in trees.items()}
    expected = {name: int(name.removeprefix("zero")[0]) for name in trees}
    assert stages == expected
    assert len(trees) == 6
    for name, tree in trees.items():
        assert ("offload_optimizer" in tree["zero_optimization"]) == name.endswith("_offload")
        assert tree["zero_optimization"].get("overlap_comm", False) is False
        assert tree["timers"]["throughput"]["enabled"] is False, "it waits for the device"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_goes_with_an_accelerator_and_a_cpu(path: Path) -> None:
    assert resolved(path, cpu=True)["bf16"]["enabled"] is False
    assert resolved(path, cpu=False)["bf16"]["enabled"] is (path.stem != "zero0")


def micro_batches() -> Tensor:
    """(steps 3, micro-batches 4, rows 2, columns 5): four inputs and the target."""
    return torch.randn(3, 4, 2, 5, generator=torch.Generator().manual_seed(1)) * 5


def small_model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def loss_of(model: torch.nn.Module, rows: Tensor) -> Tensor:
    return (model(rows[:, :4]) - rows[:, 4:]).pow(2).mean()


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def train_plain() -> list[Tensor]:
    """The same training without DeepSpeed: the reference."""
    model = small_model()
    optimizer = adamw(model)
    for step in micro_batches():
        torch.stack([loss_of(model, rows) for rows in step]).mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert norm > 2, "clipping must matter"
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def train_with_each_file(folder: Path) -> dict[str, list[list[float]]]:
    """Weights after training as each file says. Runs in a process of its own."""
    from vlm.engine.cpu import prepare_cpu

    prepare_cpu()
    import deepspeed

    os.environ["LOCAL_RANK"] = "0"
    deepspeed.init_distributed(
        "gloo",
        auto_mpi_discovery=False,
        init_method=f"file://{folder}/rendezvous",
        rank=0,
        world_size=1,
        verbose=False,
    )
    return {path.stem: train_with(path) for path in FILES}


def train_with(path: Path) -> list[list[float]]:
    import deepspeed

    model = small_model()
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=adamw(model), config=resolved(path, cpu=True)
    )
    for step in micro_batches():
        for rows in step:
            engine.backward(loss_of(engine, rows))
            engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        weights = [p.detach().flatten().tolist() for p in model.parameters()]
    engine.destroy()
    return weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[float]]]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        folder = tmp_path_factory.mktemp("deepspeed")
        return pool.submit(train_with_each_file, folder).result(timeout=300)


@pytest.mark.parametrize("name", [path.stem for path in FILES])
def test_every_shipped_file_trains_like_plain_torch_on_a_cpu(
    trained: dict[str, list[list[float]]], name: str
) -> None:
    for found, expected in zip(trained[name], train_plain(), strict=True):
        assert all(math.isfinite(x) for x in found)
        torch.testing.assert_close(torch.tensor(found), expected.flatten(), rtol=0, atol=1e-5)
