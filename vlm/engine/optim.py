"""What trains, how fast: freezing by declaration, parameter groups, the learning-rate schedule."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from vlm.config import COMPONENTS, ModelConfig, OptimConfig, ScheduleConfig
from vlm.errors import ConfigError


@dataclass(frozen=True)
class ComponentCount:
    name: str
    num_total: int
    num_trainable: int


def component(parameter_name: str) -> str:
    """`vision.tower.cls_token` -> `vision`."""
    name = parameter_name.partition(".")[0]
    assert name in COMPONENTS, f"parameter {parameter_name} belongs to no component"
    return name


def freeze(model: nn.Module, config: ModelConfig) -> list[ComponentCount]:
    """Freezes everything, then unfreezes what the recipe trains, and counts what came of it.

    Raises:
        ConfigError: nothing is left to train.
    """
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in model.parameters())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(component(name) not in config.freeze)
    counts = count_parameters(model)
    for count in counts:
        expected = 0 if count.name in config.freeze else count.num_total
        assert count.num_trainable == expected, count
    if not any(count.num_trainable for count in counts):
        raise ConfigError("model.freeze names every component; expected one that trains")
    return counts


def count_parameters(model: nn.Module) -> list[ComponentCount]:
    counts = []
    for name in COMPONENTS:
        mine = [p for n, p in model.named_parameters() if component(n) == name]
        trainable = sum(_numel(p) for p in mine if p.requires_grad)
        counts.append(ComponentCount(name, sum(map(_numel, mine)), trainable))
    return counts


def _numel(parameter: nn.Parameter) -> int:
    # under ZeRO-3 the tensor itself is empty and ds_numel holds the true size
    return parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """One group per component with decay and one without; empty ones are left out.

    Vectors (biases, norms, scales, learned queries) and position embeddings are not decayed.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((component(name), _decays(name, parameter)), []).append(parameter)
    return [
        {
            "name": f"{part}{'' if decays else '_no_decay'}",
            "params": groups[part, decays],
            "lr": getattr(config.lr, part),
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for part in COMPONENTS
        for decays in (True, False)
        if (part, decays) in groups
    ]


def _decays(name: str, parameter: nn.Parameter) -> bool:
    shape = parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape
    is_matrix = sum(size > 1 for size in shape) >= 2
    return is_matrix and "position_embedding" not in name


def optimizer(model: nn.Module, config: OptimConfig, fused: bool) -> torch.optim.AdamW:
    groups = parameter_groups(model, config)
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=fused)


def schedule(config: ScheduleConfig, num_steps: int) -> Callable[[int], float]:
    """Step -> factor of the learning rate: linear warmup, then cosine to the floor, or constant.

    With warmup w and floor f: s < w: (s+1)/w; then f + (1-f)/2 (1 + cos(pi (s-w)/(n-w))).
    """
    warmup = math.ceil(config.warmup_frac * num_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.name == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return config.floor_frac + (1 - config.floor_frac) * cosine

    return factor
