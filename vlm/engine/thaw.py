"""Freeze schedules: components that begin to train at a step of a run.

DeepSpeed fixes at the start which parameters it shards, so whatever ever trains is in the optimizer
from the first step on, and so is its memory: the run needs it later anyway. While a component
rests it takes no gradient and keeps no activations, its learning rate is 0, and its gradients are
the zeros that DeepSpeed fills in. The one trace this leaves is Adam's count of steps, which
``adapt`` puts back to zero: a component starts to train as it would in a run of its own.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from vlm.config_model import Component, ModelConfig
from vlm.engine.optim import component, frozen_at, group_component, is_adapter


def adapt(engine: Any, config: ModelConfig, step: int) -> set[Component]:
    """Call before every global step: freezes what the schedule rests, thaws what begins to train.

    Args:
        step: about to run, counted from 0. Resuming at any step works: it is all that counts.

    Returns:
        Components that begin to train with this step.
    """
    scheduled = {part for part, until in config.freeze.items() if until is not None}
    if not scheduled:
        return set()
    starting = {part for part in scheduled if config.freeze[part] == step}
    _set_trainable(engine, scheduled, frozen_at(config, step))
    for part, state in adam_states(engine):
        if part in starting:
            state["step"] = state["step"] * 0  # a tensor of its own, or a number
    return starting


def _set_trainable(engine: Any, scheduled: Iterable[str], frozen: Iterable[str]) -> None:
    named = list(engine.module.named_parameters())
    adapted = {component(name) for name, _ in named if is_adapter(name)}
    for name, parameter in named:
        part = component(name)
        if part in scheduled and (is_adapter(name) or part not in adapted):
            parameter.requires_grad_(part not in frozen)


def adam_states(engine: Any) -> Iterator[tuple[Component, dict[str, Any]]]:
    """Component and Adam state of each tensor that this rank steps, in any ZeRO stage.

    None before the first step; a tensor of which this rank holds nothing has no state.
    """
    stage = engine.zero_optimization_stage()
    zero = engine.optimizer
    adam = zero.optimizer if stage else zero
    if stage == 3:
        tensors = [
            (zero.sub_group_to_group_id[index], flat)
            for index, flat in enumerate(zero.fp32_partitioned_groups_flat)
        ]
    else:
        tensors = [(i, p) for i, group in enumerate(adam.param_groups) for p in group["params"]]
    for index, tensor in tensors:
        if tensor in adam.state:
            yield group_component(adam.param_groups[index]["name"]), adam.state[tensor]
