"""What a run must remember beside weights and optimizer, and the random states of a rank."""

import base64
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vlm.errors import CheckpointError


@dataclass
class TrainState:
    """The same on all ranks; goes to ``trainer.json``."""

    #: global steps done
    step: int = 0
    #: where the next step lies in the plan
    window: int = 0
    window_step: int = 0
    epoch: int = 0
    #: rows found bad, which others stand in for; of all ranks where it is saved
    quarantine: list[int] = field(default_factory=list)
    samples_seen: int = 0
    tokens_seen: int = 0
    #: seconds in training, over all resumes
    wall_s: float = 0.0
    #: seconds of all that is paid for: training, evaluations, checkpoints
    elapsed_s: float = 0.0
    #: indices of steps that a rollback left out, and how many there were
    left_out: list[int] = field(default_factory=list)
    num_rollbacks: int = 0
    #: of ``vlm.engine.ladder``: what the run needs to fit into memory
    oom_rung: int = 0
    #: lowest held-out loss at a step that was saved, and that step
    best_loss: float | None = None
    best_step: int | None = None
    #: whether the evaluation of this step was cut short
    eval_due: bool = False
    #: lowest held-out loss of all, evaluations since then, and whether that ended the run
    lowest_loss: float | None = None
    num_stale_evals: int = 0
    stopped_early: bool = False
    #: of ``vlm.train.health``
    health: dict[str, Any] = field(default_factory=dict)


def rng_state() -> dict[str, Any]:
    """This rank's random states as plain values, for JSON."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, following = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "torch": _encode(torch.get_rng_state()),
        "cuda": [_encode(state) for state in cuda],
        "numpy": [str(kind), np.asarray(keys).tolist(), position, has_gauss, gauss],
        "python": [version, list(internal), following],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Raises CheckpointError where ``state`` is not what ``rng_state`` returned."""
    try:
        torch.set_rng_state(_decode(state["torch"]))
        if torch.cuda.is_available() and state["cuda"]:
            torch.cuda.set_rng_state_all([_decode(text) for text in state["cuda"]])
        kind, keys, position, has_gauss, gauss = state["numpy"]
        np.random.set_state((kind, np.array(keys, np.uint32), position, has_gauss, gauss))
        version, internal, following = state["python"]
        random.setstate((version, tuple(internal), following))
    except (KeyError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(
            f"random states of a rank: {error}; expected those that training saves; take another "
            "checkpoint"
        ) from None


def seed_rank(seed: int, step: int, rank: int) -> None:
    """Random states for a rank that none were saved for, a function of its arguments alone."""
    drawn = np.random.SeedSequence([seed, step, rank]).generate_state(3, np.uint64)
    torch.manual_seed(int(drawn[0]))
    np.random.seed(int(drawn[1]) % 2**32)
    random.seed(int(drawn[2]))


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)
