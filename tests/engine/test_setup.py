import os
import re
from unittest import mock

import pytest
import torch

from tests.distributed import ranks
from tests.engine import engines
from vlm.config import Recipe
from vlm.engine import optim, setup
from vlm.errors import ConfigError


def test_without_a_launcher_there_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "16")  # as some rented machines do
    assert setup.num_ranks() == 1
    monkeypatch.setenv("RANK", "3")
    assert setup.num_ranks() == 16


def machine(threads: int) -> tuple[setup.Machine, int]:
    return setup.start_process(threads), torch.get_num_threads()


def test_a_process_that_has_started_may_start_again() -> None:
    found = ranks(2).run(machine, 1)
    for rank, (started, threads) in enumerate(found):
        assert started == setup.Machine(torch.device("cpu"), rank, 2)
        assert threads == 1


def meet_nowhere() -> str:
    failure = torch.distributed.DistNetworkError("address already in use")
    with mock.patch("deepspeed.init_distributed", side_effect=failure):
        try:
            setup.start_process(1)
        except ConfigError as error:
            return str(error)
    return "nothing"


def test_a_port_in_use_is_the_users_to_change() -> None:
    (message,) = ranks(1).run(meet_nowhere)
    assert re.match(r"the ranks cannot meet at 127.0.0.1 port \d+: address already", message)
    assert "--master_port" in message


def initialize(recipe: Recipe) -> dict:
    engine = engines.make_engine(2, recipe, engines.make_model())
    groups = engine.optimizer.param_groups
    return {
        "built": os.path.exists(os.environ["TORCH_EXTENSIONS_DIR"]),
        "groups": [(g["name"], g["lr"], g["weight_decay"]) for g in groups],
        "optimizer": type(engine.optimizer.optimizer).__name__,
        "clip": engine.gradient_clipping(),
        "accumulate": engine.gradient_accumulation_steps(),
    }


def test_an_engine_starts_uncompiled_with_what_the_recipe_says() -> None:
    recipe = engines.recipe("model.freeze=[language]", "optim.weight_decay=0.1")
    for found in ranks(2).run(initialize, recipe):
        assert not found["built"], "DeepSpeed compiled something"
        # a constant schedule with a warmup of ceil(0.3 * 6) = 2 steps: the first runs at half
        half = {"vision": 5e-4, "connector": 1e-3}
        assert found["groups"] == [
            (f"{name}{suffix}", half[name], decay)
            for name in half
            for suffix, decay in (("", 0.1), ("_no_decay", 0.0))
        ]
        assert found["optimizer"] == torch.optim.AdamW.__name__
        assert (found["clip"], found["accumulate"]) == (1.0, 2)


def test_the_optimizer_has_what_the_recipe_says() -> None:
    recipe = engines.recipe("optim.betas=[0.8, 0.95]")
    made, _ = optim.optimizer(engines.make_model(), recipe, fused=False)
    assert made.defaults["betas"] == (0.8, 0.95)
    assert made.defaults["eps"] == 1e-3
