"""Proof that training moves what the recipe trains and nothing else."""

from collections.abc import Collection

import torch
from torch import nn

from vlm import dist
from vlm.config import COMPONENTS
from vlm.engine.optim import component

#: What trains may rest a while: low precision swallows the tiny steps of a long warmup, fp16 skips
#: its first ones, and vision has no gradient in a step without frames.
PATIENCE_STEPS = 100

Checksums = dict[str, list[float]]


class MovementCheck:
    """Compares the weights with what they were, until all that trains has moved.

    Args:
        trains: components that must move; all others must not.
    """

    def __init__(self, model: nn.Module, trains: Collection[str], device: torch.device) -> None:
        self._model, self._device, self._trains = model, device, frozenset(trains)
        self._before = checksums(model)
        self._waiting = {name for name in trains if self._before[name]}
        self._num_steps = 0

    @property
    def done(self) -> bool:
        return not self._waiting

    def after_step(self) -> None:
        """Looks at the weights, once all that trains has moved not any more.

        Raises:
            RuntimeError: something frozen moved, or something that trains has not for too long.
        """
        if self.done:
            return
        moved = self._moved()
        if wrong := sorted(moved - self._trains):
            raise RuntimeError(
                f"training moved {', '.join(wrong)}, but only {sorted(self._trains)} train"
            )
        self._num_steps += 1
        self._waiting -= moved
        if self._waiting and self._num_steps == PATIENCE_STEPS:
            raise RuntimeError(
                f"{', '.join(sorted(self._waiting))} did not move in {PATIENCE_STEPS} steps, but "
                f"{sorted(self._trains)} train"
            )

    def _moved(self) -> set[str]:
        """Components that differ from the start on any rank."""
        now = checksums(self._model)
        flags = [float(now[name] != self._before[name]) for name in COMPONENTS]
        flags = dist.all_reduce(flags, self._device, "max")
        return {name for name, flag in zip(COMPONENTS, flags, strict=True) if flag}


@torch.no_grad()
def checksums(model: nn.Module) -> Checksums:
    """Per component, the sum of each parameter's values, over this rank's share of them."""
    sums: Checksums = {name: [] for name in COMPONENTS}
    for name, parameter in model.named_parameters():
        # ZeRO-3 keeps a rank's share beside the empty tensor
        held = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
        sums[component(name)].append(held.double().abs().sum().item())
    return sums
