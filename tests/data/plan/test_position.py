import dataclasses
import json
from typing import Any

import pytest

from vlm.data.plan.position import LoaderState, Position
from vlm.errors import CheckpointError

STATE = LoaderState(
    plan_id="0123456789abcdef",
    epoch=3,
    window=121,
    step=2048,
    global_step=1_000_000,
    quarantine=(5, 77),
)


def test_a_state_survives_json_and_is_small() -> None:
    text = json.dumps(STATE.to_dict())
    assert LoaderState.from_dict(json.loads(text)) == STATE
    assert len(text) < 160
    assert STATE.position == Position(121, 2048, 1_000_000)


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": -1},
        {"window": "3"},
        {"step": True},
        {"global_step": None},
        {"plan_id": 4},
        {"quarantine": 5},
        {"quarantine": [3, 3]},
        {"quarantine": [4, 3]},
        {"quarantine": [-1]},
        {"quarantine": ["a"]},
    ],
)
def test_a_damaged_state_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="loader state"):
        LoaderState.from_dict({**STATE.to_dict(), **change})


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(LoaderState)])
def test_other_keys_are_refused(name: str) -> None:
    found = STATE.to_dict()
    with pytest.raises(CheckpointError, match="unknown"):
        LoaderState.from_dict({**found, "unknown": 1})
    del found[name]
    with pytest.raises(CheckpointError, match=f"expected .*{name}"):
        LoaderState.from_dict(found)
