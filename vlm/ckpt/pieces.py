"""The state of a DeepSpeed engine as named pieces of parameters, the same for every ZeRO stage.

A rank holds of each parameter a range of its flattened elements: all of them, or under ZeRO its
partition. ``pieces`` says which, as views into the engine's own memory: to save is to read them,
to load is to fill them. Names and ranges do not depend on the number of ranks, so a checkpoint of
W ranks loads on any other number, and in another stage.

Not here: files (``vlm.ckpt.engine_state``). DeepSpeed's own checkpoints are pickles, and load only
on as many ranks as saved them.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from vlm import dist
from vlm.errors import CheckpointError

#: of AdamW, beside the weights
MOMENTS = ("exp_avg", "exp_avg_sq")


class Piece(NamedTuple):
    """Elements ``start`` to ``start + numel`` of a flattened parameter or buffer."""

    name: str
    start: int
    numel: int
    #: holds them from ``offset`` on; the optimizer's state of trained ones goes by it
    memory: torch.Tensor
    offset: int
    trained: bool
    #: whether every rank holds the same
    replicated: bool

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """(numel,) of a tensor that is laid out like ``memory``."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


def pieces(engine: Any) -> list[Piece]:
    """What this rank holds: master weights of what trains, weights of what never does, buffers.

    What the optimizer knows is trained, even while a schedule lets it rest.

    Raises:
        CheckpointError: DeepSpeed keeps states where they cannot be read (NVMe).
    """
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        if zero.swap_optimizer or zero.params_in_nvme_and_cpu:
            raise CheckpointError(
                "offload to NVMe cannot be saved; expected zero_optimization.offload_optimizer and "
                "offload_param with the device cpu or none"
            )
        found = list(_partitioned(engine.module, zero))
    else:
        found = list(_flattened(engine.module, zero) if stage else ())
        groups = zero.bit16_groups if stage else [group["params"] for group in zero.param_groups]
        trained = {parameter for group in groups for parameter in group}
        for name, parameter in engine.module.named_parameters():
            if parameter not in trained or not stage:
                own = parameter in trained
                found.append(Piece(name, 0, parameter.numel(), parameter, 0, own, True))
    kept = engine.module.state_dict().keys()
    for name, buffer in engine.module.named_buffers():
        if name in kept:
            found.append(Piece(name, 0, buffer.numel(), buffer, 0, False, True))
    return [piece for piece in found if piece.numel]


def _flattened(module: nn.Module, zero: Any) -> Iterator[Piece]:
    """ZeRO 1 and 2 lay a group's parameters end to end and cut that, in fp32."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None:
                own, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                name = names[parameter]
                yield Piece(name, own.start, own.numel, flat, there.start, True, False)


def _partitioned(module: Any, zero: Any) -> Iterator[Piece]:
    """ZeRO 3 cuts every parameter into equal parts, of which the last ones are padded."""
    for name, parameter in module.named_parameters():
        part = parameter.ds_tensor.numel()
        start = min(zero._get_param_partition_rank(parameter) * part, parameter.ds_numel)
        numel = min(part, parameter.ds_numel - start)
        place = zero.grad_position.get(zero.get_param_id(parameter))
        if place is not None:
            group, offset, _ = place
            memory = zero.fp32_partitioned_groups_flat[group]
            yield Piece(name, start, numel, memory, offset, True, False)
        else:
            yield Piece(name, start, numel, parameter.ds_tensor, 0, False, False)


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The one that steps; under ZeRO DeepSpeed wraps it."""
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def prepare_moments(engine: Any, memory: torch.Tensor, step: float) -> dict[str, torch.Tensor]:
    """AdamW's state of one tensor, as its first step would make it, at another step."""
    optimizer = base_optimizer(engine)
    fused = any(group["fused"] or group["capturable"] for group in optimizer.param_groups)
    state = optimizer.state[memory]
    state["step"] = torch.tensor(
        step, dtype=torch.float32, device=memory.device if fused else torch.device("cpu")
    )
    for name in MOMENTS:
        if name not in state:
            state[name] = torch.zeros_like(memory, requires_grad=False)
    return state


def before_loading(engine: Any) -> None:
    """ZeRO 3: parameters that are gathered at the moment are partitioned again."""
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.checkpoint_event_prologue()


def after_loading(engine: Any) -> None:
    """Derives the weights of the model from the master weights. Collective."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        masters = zero.fp32_partitioned_groups_flat
        for master, flat, group in zip(
            masters, zero.fp16_partitioned_groups_flat, zero.fp16_partitioned_groups, strict=True
        ):
            flat.data.copy_(master.data)
            for partition, values in zip(group, zero.unflatten(flat, group), strict=True):
                partition.data = values.data
        zero.checkpoint_event_epilogue()
    elif stage:
        zero.update_lp_params()
    dist.barrier()
