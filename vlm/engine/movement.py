"""Proof that training moves what the recipe trains and nothing else, in memory and in files.

Weights are compared by the sums of their bits: exact, the same for whole tensors and for the shares
that ZeRO-3 keeps, and a number each instead of a copy.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vlm import dist
from vlm.config_model import COMPONENTS
from vlm.engine.optim import component
from vlm.models.export import model_name

#: What trains may rest a while: low precision swallows the tiny steps of a long warmup, fp16 skips
#: its first ones, and vision has no gradient in a step without frames.
PATIENCE_STEPS = 100

#: element size -> integers that hold the bits
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class MovementCheck:
    """Compares the weights with what they were at the start, until all that trains has moved.

    Make it before a checkpoint is loaded: what the recipe builds is the start of a resumed run too.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device
        self._start = checksums(model)
        self._whole = _over_ranks(model, self._start)
        self._before = self._start
        self._moved: set[str] = set()
        self._in_files: set[str] = set()
        self._num_waits = 0

    @property
    def unsaved(self) -> bool:
        """Whether more has moved than in the files that were looked at; the same on all ranks."""
        return self._moved != self._in_files

    def resumed(self) -> None:
        """Call when a checkpoint has been loaded: what had moved till then proves nothing now."""
        self._before = checksums(self._model)

    def after_step(self, trains: Collection[str]) -> None:
        """Looks at the weights, once all that trains has moved not any more.

        Args:
            trains: components that the step must move; all others it must not.

        Raises:
            RuntimeError: something frozen moved, or something that trains has not for too long.
        """
        waiting = set(trains) - self._moved
        if not waiting:
            self._num_waits = 0
            return
        now = checksums(self._model)
        changed = {name for name, value in now.items() if value != self._before[name]}
        thawed = {n for n, p in self._model.named_parameters() if p.requires_grad}
        allowed = {name for name in thawed if component(name) in {*trains, *self._moved}}
        moved = self._any_rank({component(n) for n in changed & allowed}) & set(trains)
        if wrong := sorted(self._any_rank({component(n) for n in changed - allowed})):
            raise RuntimeError(
                f"training moved {', '.join(wrong)}, but only {sorted(trains)} train, and of them "
                "only what is not frozen"
            )
        self._moved |= moved
        self._num_waits += 1
        if (still := sorted(waiting - moved)) and self._num_waits == PATIENCE_STEPS:
            raise RuntimeError(
                f"{', '.join(still)} did not move in {PATIENCE_STEPS} steps, but "
                f"{sorted(trains)} train"
            )

    def after_save(self, folder: Path, trained: Collection[str]) -> None:
        """Looks at the safetensors of a saved model. Call on all ranks; the first one reads.

        Args:
            trained: components that any step so far was to move.

        Raises:
            RuntimeError: a frozen tensor differs from the start, or nothing of a part that moved.
        """
        found = self._fault_in(folder, trained) if dist.is_main() else None
        if (fault := dist.broadcast_object(found)) is not None:
            raise RuntimeError(f"{folder}: {fault}")
        self._in_files = set(self._moved)

    def _fault_in(self, folder: Path, trained: Collection[str]) -> str | None:
        names = dict(self._model.named_parameters())
        found = {n: v for n, v in file_checksums(folder).items() if n in names}
        differ = {name for name, value in found.items() if value != self._whole[name]}
        frozen = [
            name
            for name in sorted(differ)
            if component(name) not in trained or not names[name].requires_grad
        ]
        if frozen:
            return f"{frozen[0]} is frozen, and is not what the run started with"
        if missing := self._moved - {component(name) for name in differ}:
            return f"{', '.join(sorted(missing))} moved in training, and did not in what was saved"
        return None

    def _any_rank(self, parts: Collection[str]) -> set[str]:
        flags = [float(name in parts) for name in COMPONENTS]
        flags = dist.all_reduce(flags, self._device, "max")
        return {name for name, flag in zip(COMPONENTS, flags, strict=True) if flag}


@torch.no_grad()
def checksums(model: nn.Module) -> dict[str, int]:
    """Sum of the bits of each parameter, over this rank's share of it."""
    held = {name: _held(parameter) for name, parameter in model.named_parameters()}
    sums = torch.stack([_sum_bits(tensor) for tensor in held.values()]).tolist()
    return dict(zip(held, sums, strict=True))


def file_checksums(folder: Path) -> dict[str, int]:
    """The same for every tensor in the safetensors of an export."""
    sums: dict[str, int] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                sums[model_name(path, name)] = int(_sum_bits(file.get_tensor(name)))
    return sums


def _held(parameter: Any) -> Tensor:
    """This rank's share of a parameter, flat; whole but under ZeRO-3."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach().flatten()
    share = parameter.ds_tensor.detach().flatten()
    # the last shares are padded with whatever lay there
    return share[: max(0, parameter.ds_numel - dist.rank() * share.numel())]


def _sum_bits(tensor: Tensor) -> Tensor:
    """() int64, modulo 2^64: no order and no cut into shares changes it."""
    return tensor.contiguous().view(BITS[tensor.element_size()]).sum(dtype=torch.int64)


def _over_ranks(model: nn.Module, shares: Mapping[str, int]) -> dict[str, int]:
    """Checksums of whole parameters from those of shares."""
    if not any(hasattr(p, "ds_tensor") for p in model.parameters()):
        return dict(shares)
    parts = dist.gather_objects(shares)
    totals = {name: sum(part[name] for part in parts) for name in shares}
    return {name: (total + 2**63) % 2**64 - 2**63 for name, total in totals.items()}
