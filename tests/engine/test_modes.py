from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

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
