"""What trains, how fast: freezing by declaration, parameter groups, learning rates over steps.

Not here: what changes while a run goes on (``vlm.engine.thaw``).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlm.config import Recipe
from vlm.config_model import COMPONENTS, Component, ModelConfig
from vlm.config_optim import OptimConfig, ScheduleConfig
from vlm.engine.low_bit import is_packed, num_weights
from vlm.errors import ConfigError


@dataclass(frozen=True)
class ComponentCount:
    name: Component
    num_total: int
    num_trainable: int


def component(parameter_name: str) -> Component:
    """`vision.tower.cls_token` -> `vision`."""
    name = parameter_name.partition(".")[0]
    assert name in COMPONENTS, f"parameter {parameter_name} belongs to no component"
    return name


def is_adapter(parameter_name: str) -> bool:
    """Whether PEFT put the parameter there to be trained: LoRA, or a trained copy of a module."""
    parts = parameter_name.split(".")
    return "modules_to_save" in parts or any(part.startswith("lora_") for part in parts)


def freeze(model: nn.Module, config: ModelConfig) -> list[ComponentCount]:
    """Freezes everything, then unfreezes what the recipe ever trains, and counts what came of it.

    Of a component with adapters only those train, of a tower its last layers if so declared.

    Raises:
        ConfigError: nothing is left to train at the first step, or packed weights would.
    """
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in model.parameters())
    names = [name for name, _ in model.named_parameters()]
    adapted = {component(name) for name in names if is_adapter(name)}
    still = _before_last_layers(model, config)
    for name, parameter in model.named_parameters():
        part = component(name)
        trains = config.freeze.get(part, 0) is not None and name not in still
        if trains and (is_adapter(name) or part not in adapted):
            if is_packed(parameter):
                raise ConfigError(
                    f"model.{part} has 4-bit weights, which cannot train; give it adapters (LoRA), "
                    f"or name {part} in model.freeze"
                )
            parameter.requires_grad_(True)
    counts = count_parameters(model)
    for count in counts:
        assert config.freeze.get(count.name, 0) is not None or count.num_trainable == 0, count
    if not any(count.num_trainable for count in counts if count.name not in config.freeze):
        raise ConfigError(
            "model.freeze names every component, so nothing trains at the start; expected one "
            "that trains from the first step"
        )
    return counts


def _before_last_layers(model: nn.Module, config: ModelConfig) -> set[str]:
    """Parameters of a tower of which only the last layers train: all others."""
    count = config.vision.train_last
    if count is None:
        return set()
    vision: Any = model.vision
    layers = vision.layers
    if count > len(layers):
        raise ConfigError(
            f"model.vision.train_last: found {count}, but the tower has {len(layers)} layers"
        )
    last = {parameter for layer in layers[-count:] for parameter in layer.parameters()}
    return {f"vision.{n}" for n, p in vision.named_parameters() if p not in last}


def count_parameters(model: nn.Module) -> list[ComponentCount]:
    counts = []
    for name in COMPONENTS:
        mine = [p for n, p in model.named_parameters() if component(n) == name]
        trainable = sum(num_weights(p) for p in mine if p.requires_grad)
        counts.append(ComponentCount(name, sum(map(num_weights, mine)), trainable))
    return counts


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """One group per component with decay and one without; empty ones are left out.

    Vectors (biases, norms, scales, learned queries) and position embeddings are not decayed.
    """
    decay = config.weight_decay.model_dump()
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((component(name), _decays(name, parameter)), []).append(parameter)
    return [
        {
            "name": f"{part}{'' if decays else '_no_decay'}",
            "params": groups[part, decays],
            "weight_decay": decay[part] if decays else 0.0,
        }
        for part in COMPONENTS
        for decays in (True, False)
        if (part, decays) in groups
    ]


def group_component(group_name: str) -> Component:
    """`vision_no_decay` -> `vision`."""
    return component(group_name.removesuffix("_no_decay"))


def _decays(name: str, parameter: nn.Parameter) -> bool:
    shape = parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape
    is_matrix = sum(size > 1 for size in shape) >= 2
    return is_matrix and "position_embedding" not in name


def optimizer(
    model: nn.Module, recipe: Recipe, fused: bool
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW over the parameter groups, and the schedule that sets their learning rates.

    The groups start at a rate of 1 and the schedule gives absolute ones: a component may rest at 0
    and train later.
    """
    config = recipe.optim
    groups = parameter_groups(model, config)
    adam = torch.optim.AdamW(groups, lr=1.0, betas=config.betas, eps=config.eps, fused=fused)
    rates = [_rates(recipe, group_component(group["name"])) for group in groups]
    return adam, torch.optim.lr_scheduler.LambdaLR(adam, rates)


def _rates(recipe: Recipe, part: Component) -> Callable[[int], float]:
    return lambda step: learning_rate(recipe, part, step)


def learning_rate(recipe: Recipe, part: Component, step: int) -> float:
    """A component's rate at a global step, counted from 0; 0 while it is frozen."""
    if part in frozen_at(recipe.model, step):
        return 0.0
    rate = recipe.optim.lr.model_dump()[part]
    for start in sorted(recipe.optim.lr_at):
        if start <= step:
            rate = recipe.optim.lr_at[start].get(part, rate)
    return schedule(recipe.optim.schedule, recipe.train.steps, rate)(step)


def frozen_at(config: ModelConfig, step: int) -> set[Component]:
    """Components that do not train at a global step, counted from 0."""
    return {part for part, until in config.freeze.items() if until is None or step < until}


def trained_at(recipe: Recipe, step: int) -> set[Component]:
    """Components that a global step moves."""
    return {part for part in COMPONENTS if learning_rate(recipe, part, step) > 0}


def trained_before(recipe: Recipe, step: int) -> set[Component]:
    """Components that any global step before this one moved."""
    changes = {0, *filter(None, recipe.model.freeze.values()), *recipe.optim.lr_at}
    return {part for start in changes if start < step for part in trained_at(recipe, start)}


def schedule(config: ScheduleConfig, num_steps: int, peak: float) -> Callable[[int], float]:
    """Step -> learning rate: linear warmup to the peak, then constant, or by cosine to the end.

    With warmup w, peak p and end e: s < w: p (s+1)/w; then e + (p-e)/2 (1 + cos(pi (s-w)/(n-w))).
    The end is a share of the peak (cosine) or the same rate for all (converging), which may be
    above it. A peak of 0 stays there.
    """
    warmup = math.ceil(config.warmup_frac * num_steps)
    end = peak * config.floor_frac if config.target is None or peak == 0 else config.target

    def rate(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / warmup
        if config.name == "constant":
            return peak
        progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
        return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * progress))

    return rate
