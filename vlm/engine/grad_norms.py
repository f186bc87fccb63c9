"""The norm of each component's gradient, before clipping.

DeepSpeed measures a norm for each parameter group (under ZeRO-3 for each sub-group) and keeps the
total alone. ``GradNorms`` notes the parts as they pass by, which costs nothing. Without ZeRO, where
DeepSpeed measures none and would apply gradients that are not finite, it measures them itself and
drops such gradients. Not here: the total norm under ZeRO, which DeepSpeed clips by.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlm.config_model import COMPONENTS
from vlm.engine.optim import component, group_component

#: what DeepSpeed measures the norm of a group with: without and with offloaded gradients
MEASURES = ("get_grad_norm_direct", "complete_grad_norm_calculation_for_cpu_offload")


class GradNorms:
    """Watches an engine: ``before_step``, ``engine.step()`` if that is true, then ``take``."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        optimizer, self._stage = engine.optimizer, engine.zero_optimization_stage()
        #: component of each norm that DeepSpeed measures, in its order
        self._parts = [group_component(group["name"]) for group in optimizer.param_groups]
        if self._stage == 3:
            groups = optimizer.sub_group_to_group_id
            self._parts = [self._parts[groups[index]] for index in sorted(groups)]
        self._found: list[Tensor] = []
        if self._stage:
            for name in MEASURES:
                vars(optimizer)[name] = self._noted(vars(type(optimizer))[name].__get__(optimizer))

    @property
    def guards(self) -> bool:
        """Whether nobody else keeps gradients that are not finite from being applied."""
        engine = self._engine
        return not (self._stage or engine.fp16_enabled() or engine.bfloat16_enabled())

    def before_step(self) -> bool:
        """Call when all gradients are there. False: they were not finite, and the step is over."""
        self._found.clear()
        if self._stage:
            return True
        named = dict(self._engine.module.named_parameters())
        squares = {part: torch.zeros((), device=self._engine.device) for part in COMPONENTS}
        for name, parameter in named.items():
            if parameter.grad is not None:
                squares[component(name)] += parameter.grad.float().square().sum()
        self._parts, self._found = list(COMPONENTS), [value.sqrt() for value in squares.values()]
        if not self.guards or math.isfinite(sum(squares.values(), start=torch.zeros(())).item()):
            return True
        self._leave_out()
        return False

    def _leave_out(self) -> None:
        """What DeepSpeed's step does, without the update."""
        engine = self._engine
        engine.optimizer.zero_grad()
        engine.lr_scheduler.step()
        engine.micro_steps += 1
        engine.global_steps += 1
        engine.skipped_steps += 1

    def take(self) -> Tensor:
        """(components,) float64, in the order of ``COMPONENTS``: nan where none was measured."""
        device = self._engine.device
        squares = torch.full((len(COMPONENTS),), math.nan, dtype=torch.float64, device=device)
        if len(self._found) != len(self._parts):  # thrown away before it was measured
            return squares
        scale = 1.0
        if self._engine.fp16_enabled():
            scale = self._engine.optimizer.loss_scale
        for part, norm in zip(self._parts, self._found, strict=True):
            index = COMPONENTS.index(part)
            # DeepSpeed says -1 for a norm that is not finite
            square = torch.where(norm < 0, math.inf, norm.double() / scale).square()
            squares[index] = torch.nansum(torch.stack([squares[index], square]))
        return squares.sqrt()

    def _noted(self, measure: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def measured(*args: Any, **kwargs: Any) -> Tensor:
            norm = measure(*args, **kwargs)
            self._found.append(torch.as_tensor(norm, device=self._engine.device))
            return norm

        return measured
