import math
from pathlib import Path

import pytest
import torch

from tests.models import tiny
from tests.train import helpers
from vlm.config_model import COMPONENTS, ModelConfig
from vlm.config_optim import ScheduleConfig
from vlm.engine import optim
from vlm.errors import ConfigError


def model_config(*freeze: str) -> ModelConfig:
    return helpers.recipe(Path("unused"), f"model.freeze=[{','.join(freeze)}]").model


@pytest.mark.parametrize("frozen", [(), ("vision",), ("vision", "language"), ("connector",)])
def test_freeze_is_by_component(frozen: tuple[str, ...]) -> None:
    model = tiny.make_model()
    counts = optim.freeze(model, model_config(*frozen))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name.split(".")[0] not in frozen), name
    assert [c.name for c in counts] == list(COMPONENTS)
    for count in counts:
        numel = sum(p.numel() for p in getattr(model, count.name).parameters())
        assert count.num_total == numel > 0
        assert count.num_trainable == (0 if count.name in frozen else numel)


def test_what_was_frozen_before_thaws() -> None:
    model = tiny.make_model().requires_grad_(False)
    optim.freeze(model, model_config("language"))
    assert all(p.requires_grad for p in model.vision.parameters())


def test_to_freeze_everything_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="every component"):
        optim.freeze(tiny.make_model(), model_config(*COMPONENTS))


def groups_of(model: torch.nn.Module) -> dict[str, dict]:
    recipe = helpers.recipe(Path("unused"), "optim.weight_decay=0.1")
    return {g["name"]: g for g in optim.parameter_groups(model, recipe.optim)}


def test_groups_hold_each_trained_parameter_once() -> None:
    model = tiny.make_model()
    groups = groups_of(model)
    assert list(groups) == [f"{c}{s}" for c in COMPONENTS for s in ("", "_no_decay")]
    held = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    for name, group in groups.items():
        assert group["weight_decay"] == (0.0 if name.endswith("_no_decay") else 0.1)


def test_what_is_not_decayed() -> None:
    """By name, from a list made by hand; the code goes by shape."""
    model = tiny.make_model(query_bias=True)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = groups_of(model)
    decayed = {names[id(p)] for g in groups.values() if g["weight_decay"] for p in g["params"]}
    vectors = ("bias", "norm", "layernorm", "lambda1", "q_init", "q_static", "token", "position")
    for name in names.values():
        is_vector = any(word in part for part in name.split(".") for word in vectors)
        # the one word of the list that is also in the name of a matrix
        is_vector = is_vector and "embed_tokens" not in name
        assert (name in decayed) != is_vector, name


def test_each_part_has_its_own_rate_and_decay() -> None:
    """Without gradients a step of AdamW multiplies what it decays by 1 - rate * decay."""
    rates = {"vision": 1e-3, "connector": 1e-2, "language": 1e-1}
    decays = {"vision": 0.3, "connector": 0.2, "language": 0.1}
    recipe = helpers.recipe(
        Path("unused"),
        f"optim.lr={rates}",
        f"optim.weight_decay={decays}",
        "optim.schedule={name: constant, warmup_frac: 0}",
    )
    model = tiny.make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adam, _ = optim.optimizer(model, recipe, fused=False)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adam.step()
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        is_matrix = parameter.squeeze().ndim > 1 and "position" not in name
        factor = 1 - rates[part] * decays[part] if is_matrix else 1
        torch.testing.assert_close(parameter.detach(), before[name] * factor, rtol=1e-9, atol=0)


def test_a_frozen_component_leaves_no_empty_group() -> None:
    model = tiny.make_model()
    optim.freeze(model, model_config("vision", "language"))
    groups = groups_of(model)
    assert list(groups) == ["connector", "connector_no_decay"]
    assert all(g["params"] for g in groups.values())


def test_a_tied_matrix_is_in_one_group_only() -> None:
    model = tiny.make_model()
    lm = model.language.lm
    assert lm.get_input_embeddings().weight is lm.get_output_embeddings().weight
    held = [p for g in groups_of(model).values() for p in g["params"]]
    assert sum(p is lm.get_input_embeddings().weight for p in held) == 1


def test_cosine_against_its_closed_form() -> None:
    factor = optim.schedule(ScheduleConfig(warmup_frac=0.1, floor_frac=0.2), 100, 1.0)
    assert [factor(s) for s in range(10)] == pytest.approx([s / 10 for s in range(1, 11)])
    for step in range(10, 100):
        share = (step - 10) / 90
        # cos(2x) = 2 cos(x)^2 - 1
        assert factor(step) == pytest.approx(0.2 + 0.8 * math.cos(math.pi * share / 2) ** 2)
    assert factor(10) == 1.0
    assert factor(55) == pytest.approx(0.6)  # half way in time and in height
    assert factor(100) == factor(1000) == pytest.approx(0.2)


def test_all_components_converge_to_one_rate_from_above_and_below() -> None:
    config = ScheduleConfig(name="converging", warmup_frac=0.1, target=3e-5)
    for peak in (1e-3, 1e-5):
        rate = optim.schedule(config, 100, peak)
        assert rate(4) == pytest.approx(peak / 2) and rate(10) == pytest.approx(peak)
        assert rate(55) == pytest.approx((peak + 3e-5) / 2)
        assert rate(100) == rate(1000) == pytest.approx(3e-5)
        rates = [rate(step) for step in range(10, 101)]
        assert rates == sorted(rates, reverse=peak > 3e-5)
    assert not any(optim.schedule(config, 100, 0.0)(step) for step in range(101))  # it rests
    for wrong in ({"name": "converging"}, {"target": 1e-5}):
        with pytest.raises(ValueError, match="set `target` with `name: converging`"):
            ScheduleConfig(**wrong)


@pytest.mark.parametrize(
    ("config", "num_steps", "expected"),
    [
        (ScheduleConfig(name="constant", warmup_frac=0.5), 4, [0.5, 1, 1, 1, 1]),
        (ScheduleConfig(name="constant", warmup_frac=0), 3, [1, 1, 1, 1]),
        (ScheduleConfig(warmup_frac=1), 3, [1 / 3, 2 / 3, 1, 1]),
        (ScheduleConfig(warmup_frac=0, floor_frac=0), 2, [1, 0.5, 0]),
        (ScheduleConfig(warmup_frac=0.05), 1, [1, 1]),
    ],
)
def test_short_schedules(config: ScheduleConfig, num_steps: int, expected: list[float]) -> None:
    factor = optim.schedule(config, num_steps, 1.0)
    assert [factor(s) for s in range(num_steps + 1)] == pytest.approx(expected)
