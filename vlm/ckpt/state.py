"""What a run must remember beside weights and optimizer, and the random states of a rank."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass
class TrainState:
    """The same on all ranks; goes to ``trainer.json``."""

    #: global steps done
    step: int = 0
    #: where the next step lies in the plan
    window: int = 0
    window_step: int = 0
    epoch: int = 0
    samples_seen: int = 0
    tokens_seen: int = 0
    #: seconds in training, over all resumes
    wall_s: float = 0.0


def rng_state() -> dict[str, Any]:
    """This rank's random states, as tensors and plain values: nothing that needs unpickling."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, following = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(kind), np.asarray(keys).tolist(), position, has_gauss, gauss],
        "python": [version, list(internal), following],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), position, has_gauss, gauss))
    version, internal, following = state["python"]
    random.setstate((version, tuple(internal), following))
