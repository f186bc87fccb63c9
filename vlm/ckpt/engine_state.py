"""An engine's state to files and back: each rank writes its pieces, and reads those it needs.

1. ``write``: a rank's pieces go into ``state_RRRRR.safetensors``; what all ranks hold alike they
   share out. Keys are ``KIND/START/NAME``: ``weight``, ``exp_avg`` or ``exp_avg_sq``, the first
   element, the parameter. The metadata key ``steps`` says how often each parameter was stepped.
2. ``load``: a rank opens all those files and copies the ranges that it holds now. The number of
   ranks and the ZeRO stage may have changed: nothing is gathered, converted or executed.

Not here: which checkpoint, and whether it is whole (``vlm.ckpt.load``).
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlm import dist
from vlm.ckpt.agree import together
from vlm.ckpt.files import FileInfo
from vlm.ckpt.pieces import (
    MOMENTS,
    Piece,
    after_loading,
    base_optimizer,
    before_loading,
    pieces,
    prepare_moments,
)
from vlm.ckpt.tensors import TensorFile, write
from vlm.errors import CheckpointError

WEIGHT = "weight"


@dataclass(frozen=True)
class Counters:
    """What is the same on all ranks, as plain values."""

    global_steps: int
    global_samples: int
    skipped_steps: int
    #: of torch's scheduler; the learning rates follow from them and the recipe
    last_epoch: int
    step_count: int
    loss_scaler: dict[str, bool | int | float]


def state_file(rank: int) -> str:
    return f"state_{rank:05d}.safetensors"


def write_pieces(engine: Any, folder: Path) -> tuple[str, FileInfo]:
    """Writes this rank's file; returns its name and what it holds.

    Raises:
        OSError: the disk is full, the folder cannot be written.
    """
    states = base_optimizer(engine).state
    tensors: dict[str, torch.Tensor] = {}
    steps: dict[str, float] = {}
    for piece in _share(pieces(engine)):
        tensors[_key(WEIGHT, piece.start, piece.name)] = piece.view(piece.memory)
        state = states.get(piece.memory) if piece.trained else None
        if state:
            steps[piece.name] = float(state["step"])
            for kind in MOMENTS:
                tensors[_key(kind, piece.start, piece.name)] = piece.view(state[kind])
    name = state_file(dist.rank())
    return name, write(folder / name, tensors, {"steps": json.dumps(steps)})


def _share(found: list[Piece]) -> Iterable[Piece]:
    rank, world_size = dist.rank(), dist.world_size()
    replicated = [piece for piece in found if piece.replicated]
    yield from (piece for piece in found if not piece.replicated)
    yield from replicated[rank::world_size]


def _key(kind: str, start: int, name: str) -> str:
    return f"{kind}/{start}/{name}"


def counters(engine: Any) -> Counters:
    scheduler = engine.lr_scheduler
    return Counters(
        global_steps=engine.global_steps,
        global_samples=engine.global_samples,
        skipped_steps=engine.skipped_steps,
        last_epoch=scheduler.last_epoch,
        step_count=scheduler._step_count,
        loss_scaler=_scaler_state(engine),
    )


def _scaler_state(engine: Any) -> dict[str, bool | int | float]:
    if engine.zero_optimization_stage() == 0:
        return {}
    found = vars(engine.optimizer.loss_scaler)
    return {k: v for k, v in found.items() if isinstance(v, int | float)}


def load_pieces(engine: Any, paths: Iterable[Path]) -> None:
    """Fills this rank's pieces from the files of all ranks that saved. Collective.

    Raises:
        CheckpointError: on all ranks: a file is damaged, or of another model.
    """
    before_loading(engine)
    together(lambda: _fill(engine, _Store(paths)))
    after_loading(engine)


def _fill(engine: Any, store: "_Store") -> None:
    found = pieces(engine)
    parameters = {name for name, _ in engine.module.named_parameters()}
    buffers = {piece.name for piece in found} - parameters
    if strange := sorted(store.names - parameters - buffers):
        raise CheckpointError(
            f"checkpoint {store.where} holds {', '.join(strange[:3])}, which this model has not; "
            "expected the model it was saved with"
        )
    stepped: dict[torch.Tensor, float] = {}
    for piece in found:
        piece.view(piece.memory).copy_(store.read(WEIGHT, piece))
        if not piece.trained:
            continue
        step = store.steps.get(piece.name, 0.0)
        if stepped.setdefault(piece.memory, step) != step:
            raise CheckpointError(
                f"checkpoint {store.where}: {piece.name} was stepped {step:.0f} times, others of "
                f"its group {stepped[piece.memory]:.0f} times; expected equal numbers"
            )
        # without it the first step makes the state, as in a fresh run
        if step:
            state = prepare_moments(engine, piece.memory, step)
            for kind in MOMENTS:
                piece.view(state[kind]).copy_(store.read(kind, piece))


class _Store:
    """Ranges of named tensors that lie in the files of several ranks."""

    def __init__(self, paths: Iterable[Path]) -> None:
        files = [TensorFile(path) for path in paths]
        self.where = files[0].path.parent
        self.names: set[str] = set()
        self.steps: dict[str, float] = {}
        self._parts: dict[tuple[str, str], list[tuple[int, int, str, TensorFile]]] = {}
        for file in files:
            try:
                steps = dict(json.loads(file.metadata["steps"]))
                self.steps.update({name: float(step) for name, step in steps.items()})
                for key, numel in file.sizes.items():
                    kind, start, name = key.split("/", 2)
                    self.names.add(name)
                    part = (int(start), int(start) + numel, key, file)
                    self._parts.setdefault((kind, name), []).append(part)
            except (KeyError, ValueError, TypeError):
                raise CheckpointError(
                    f"checkpoint file {file.path}: its keys are not KIND/START/NAME, or it has no "
                    "`steps`; expected the state that training writes"
                ) from None

    def read(self, kind: str, piece: Piece) -> torch.Tensor:
        """(numel,) elements of ``piece``, put together from what several ranks saved."""
        start, stop = piece.start, piece.start + piece.numel
        found: list[torch.Tensor] = []
        at = start  # parts must follow each other: no hole, no overlap
        for first, last, key, file in sorted(self._parts.get((kind, piece.name), ()), key=_range):
            if first <= at < min(stop, last):
                found.append(file.read(key, at - first, min(stop, last) - first))
                at = min(stop, last)
        if at != stop:
            raise CheckpointError(
                f"checkpoint {self.where}: {kind} of {piece.name} has {at - start} of the elements "
                f"{start} to {stop}; expected all of them, of the model that was saved"
            )
        return torch.cat(found)


def _range(part: tuple[int, int, str, TensorFile]) -> tuple[int, int]:
    return part[:2]


def set_counters(engine: Any, found: Counters) -> None:
    """Puts back what ``counters`` returned, and the learning rates that follow from it."""
    engine.global_steps = found.global_steps
    engine.global_samples = found.global_samples
    engine.skipped_steps = found.skipped_steps
    scheduler = engine.lr_scheduler
    scheduler.last_epoch, scheduler._step_count = found.last_epoch, found.step_count
    scheduler._last_lr = [
        rate * factor(scheduler.last_epoch)
        for rate, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    groups = base_optimizer(engine).param_groups
    for group, rate in zip(groups, scheduler._last_lr, strict=True):
        group["lr"] = rate
    if engine.zero_optimization_stage():
        scaler = vars(engine.optimizer.loss_scaler)
        scaler.update({key: value for key, value in found.loss_scaler.items() if key in scaler})
