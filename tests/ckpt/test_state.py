import random
from pathlib import Path

import numpy as np
import torch

from vlm.ckpt.state import rng_state, set_rng_state


def draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        float(torch.rand(())),
        float(torch.randn(())),
    ]


def test_random_states_survive_a_file_without_pickles(tmp_path: Path) -> None:
    draw()  # leaves a second Gaussian waiting in numpy and python
    torch.save(rng_state(), tmp_path / "rank.pt")
    first = draw()
    assert draw() != first
    set_rng_state(torch.load(tmp_path / "rank.pt", weights_only=True))
    assert draw() == first


def test_all_bits_of_the_states_come_back() -> None:
    draw()
    state = rng_state()
    python, array, tensor = random.getstate(), np.random.get_state(), torch.get_rng_state()
    draw()
    set_rng_state(state)
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), tensor)
    for found, expected in zip(np.random.get_state(), array, strict=True):
        assert np.array_equal(found, expected)
