"""Against a reader that refuses whatever JSON does not have."""

import json
import math

import pytest

from vlm.train.portable import dumps, revive


def refuse(name: str) -> None:
    raise ValueError(name)


def test_what_json_does_not_have_goes_as_text() -> None:
    value = {"a": math.nan, "b": [1.5, (math.inf, {"c": -math.inf})], "d": None, "e": "nan "}
    found = json.loads(dumps(value), parse_constant=refuse)
    assert found == {"a": "nan", "b": [1.5, ["inf", {"c": "-inf"}]], "d": None, "e": "nan "}
    with pytest.raises(ValueError, match="NaN"):  # plain json's own
        json.loads(json.dumps(value), parse_constant=refuse)


def test_it_comes_back_as_a_number() -> None:
    assert math.isnan(revive("nan")) and revive("-inf") == -math.inf
    assert revive("nancy") == "nancy" and revive(None) is None and revive(2.5) == 2.5
