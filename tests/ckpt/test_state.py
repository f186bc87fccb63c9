import json
import random

import numpy as np
import pytest
import torch

from vlm.ckpt.state import rng_state, seed_rank, set_rng_state
from vlm.errors import CheckpointError


def draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        float(torch.rand(())),
        float(torch.randn(())),
    ]


def test_random_states_survive_json() -> None:
    draw()  # leaves a second Gaussian waiting in numpy and python
    text = json.dumps(rng_state())
    first = draw()
    assert draw() != first
    set_rng_state(json.loads(text))
    assert draw() == first


def test_all_bits_of_the_states_come_back() -> None:
    draw()
    state = json.loads(json.dumps(rng_state()))
    python, array, tensor = random.getstate(), np.random.get_state(), torch.get_rng_state()
    draw()
    set_rng_state(state)
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), tensor)
    for found, expected in zip(np.random.get_state(), array, strict=True):
        assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    "change", [{"torch": "AAAA"}, {"torch": 7}, {"numpy": []}, {"python": [3, ["x"], None]}, {}]
)
def test_other_states_are_one_clear_error(change: dict) -> None:
    state = {**rng_state(), **change}
    if not change:
        del state["numpy"]
    with pytest.raises(CheckpointError, match="random states of a rank"):
        set_rng_state(state)


def test_new_ranks_draw_apart_and_always_the_same() -> None:
    drawn = []
    for arguments in [(1, 50, 0), (1, 50, 1), (1, 51, 0), (2, 50, 0), (1, 50, 0)]:
        seed_rank(*arguments)
        drawn.append(draw())
    assert drawn[0] == drawn[4]
    for column in zip(*drawn[:4], strict=True):
        assert len(set(column)) == 4
