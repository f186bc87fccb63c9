from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.models.cases import CASES
from tests.models.test_latent import with_latents
from tests.models.tiny import make_baseline, make_batch, make_model
from tests.train import helpers
from vlm.engine.modes import check_modes, forward_mode, only_mode
from vlm.errors import ConfigError


def test_without_shares_the_model_chooses() -> None:
    assert forward_mode(helpers.recipe(Path("unused")), 0) is None


def test_modes_come_as_often_as_their_shares_say_and_the_same_again() -> None:
    recipe = helpers.recipe(Path("unused"), "train.modes={a: 3, b: 1}")
    drawn = [forward_mode(recipe, step) for step in range(4000)]
    assert Counter(drawn)["a"] == pytest.approx(3000, abs=100)
    assert [forward_mode(recipe, step) for step in (7, 3999, 12)] == [
        drawn[7],
        drawn[3999],
        drawn[12],
    ]
    other = helpers.recipe(Path("unused"), "train.modes={a: 3, b: 1}", "seed=2")
    assert [forward_mode(other, step) for step in range(100)] != drawn[:100]


def test_a_mode_that_cannot_be_trained_in() -> None:
    recipe = helpers.recipe(Path("unused"), "train.modes={coarse_fine: 1, autoregressive: 1}")
    model = SimpleNamespace(train_modes=("coarse_only", "coarse_fine"))
    with pytest.raises(
        ConfigError, match=r"train\.modes: found autoregressive, expected of coarse"
    ):
        check_modes(model, recipe)


@pytest.mark.parametrize(
    "modes,expected",
    [("{}", None), ("{caption: 2}", "caption"), ("{caption: 1, joint: 1}", None)],
)
def test_a_recipe_that_names_one_mode_has_one(modes: str, expected: str | None) -> None:
    assert only_mode(helpers.recipe(Path("unused"), f"train.modes={modes}")) == expected


@pytest.mark.parametrize("name", CASES)
def test_families_report_the_passes_that_they_say(name: str) -> None:
    make, per_frame, mode = CASES[name]
    model = make()
    with torch.no_grad():
        output = model(
            with_latents(make_batch([(2, 5)], per_frame=per_frame)), mode=mode, measure_all=True
        )
    assert set(model.passes[mode]) == output.parts.keys() & {"fine", "coarse"}
    assert model.passes.keys() == set(model.train_modes)


#: what a recipe of pairs must say
PREFERENCE = [
    "data.loss_on=preference",
    "data.text_frac=0",
    "data.augment={}",
    "model.connector.coarse_weight=0",
]


@pytest.mark.parametrize(
    "make,overrides,message",
    [
        (make_model, ["train.best_metric=eval_loss_coarse"], None),
        (
            make_model,
            ["train.modes={coarse_only: 1}", "train.best_metric=eval_loss_fine"],
            "found eval_loss_fine, expected of eval_loss, eval_loss_coarse: ",
        ),
        (
            make_model,
            [*PREFERENCE, "train.best_metric=eval_loss_coarse"],
            "expected of eval_loss, eval_loss_fine: ",
        ),
        (make_model, ["train.best_metric=eval_loss_autoregressive"], "expected of eval_loss, "),
        (
            make_model,
            ["train.best_metric=eval_loss_autoregressive", "train.eval_autoregressive=true"],
            None,
        ),
        (make_baseline, ["train.best_metric=eval_loss_fine"], "expected of eval_loss: "),
        (make_baseline, ["train.eval_autoregressive=true"], "no such mode, found one_pass"),
    ],
)
def test_the_best_goes_by_what_is_measured(
    make: Callable[[], Any], overrides: list[str], message: str | None
) -> None:
    """Said before anything is trained, not at the first evaluation."""
    recipe = helpers.recipe(Path("unused"), *overrides)
    if message is None:
        check_modes(make(), recipe)
    else:
        with pytest.raises(ConfigError, match=message):
            check_modes(make(), recipe)
