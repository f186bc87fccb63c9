"""Proof that a step moved what trains and nothing else."""

import torch
from torch import nn

from vlm import dist
from vlm.config import COMPONENTS
from vlm.engine.optim import component

Checksums = dict[str, list[float]]


@torch.no_grad()
def checksums(model: nn.Module) -> Checksums:
    """Per component, the sum of each parameter's values, over this rank's share of them."""
    sums: Checksums = {name: [] for name in COMPONENTS}
    for name, parameter in model.named_parameters():
        # ZeRO-3 keeps a rank's share beside the empty tensor
        held = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
        sums[component(name)].append(held.double().abs().sum().item())
    return sums


def check_moved(
    before: Checksums, after: Checksums, frozen: tuple[str, ...], device: torch.device
) -> None:
    """Raises if a frozen component changed or a trained one did not: a bug of ours."""
    moved = [float(before[name] != after[name]) for name in COMPONENTS]
    moved = dist.all_reduce(moved, device, "max")
    expected = [float(name not in frozen and bool(before[name])) for name in COMPONENTS]
    if moved != expected:
        found = [name for name, did in zip(COMPONENTS, moved, strict=True) if did]
        raise RuntimeError(
            f"the first step moved {found}, but {list(frozen)} are frozen of {list(COMPONENTS)}"
        )
