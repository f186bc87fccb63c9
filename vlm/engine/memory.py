"""What DeepSpeed keeps of a model on each rank, in bytes: weights, gradients, optimizer, buffers.

Follows DeepSpeed 0.19.8 as ``vlm.engine.setup`` uses it (torch's AdamW, one group per component
with decay and one without), stage by stage. ``tests/engine/test_memory.py`` holds it to engines
that train. Not here: activations (``vlm.estimate.activations``), which no stage shares out.

P trains, F does not, W ranks.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from vlm.config_optim import OptimConfig
from vlm.engine.optim import parameter_groups

FP32 = 4
#: bytes of Adam's two moments
MOMENTS = 8
#: Adam's count of steps, a tensor of its own for each that is stepped
COUNTER = 4
#: elements that stage 0 reduces at a time
STAGE0_BUCKET = 500_000_000
SIZES = {"fp32": 4, "fp16": 2, "bf16": 2}
#: DeepSpeed's defaults where a file is silent
DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "sub_group_size": 1_000_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
}


class Sizes(NamedTuple):
    """Elements of a model's parameters, as DeepSpeed will group them."""

    #: of each optimizer group, its parameters in order
    groups: tuple[tuple[int, ...], ...]
    #: frozen ones of floating types, which are cast to the training precision
    frozen: tuple[int, ...]
    #: bytes of frozen ones that stay as they are (4-bit weights)
    packed_bytes: int = 0

    @property
    def num_trainable(self) -> int:
        return sum(map(sum, self.groups))

    @property
    def num_parameters(self) -> int:
        """But packed ones."""
        return self.num_trainable + sum(self.frozen)


@dataclass(frozen=True)
class StateBytes:
    """Of one rank, the one that keeps most."""

    weights: int
    #: as they add up over the micro-batches of a step
    gradients: int
    #: fp32 weights and Adam's moments
    optimizer: int
    #: for communication, while gradients are made
    buckets: int
    #: beside the rest in the optimizer's step, when no activations are left
    step_extra: int
    #: on the host, offloaded
    host: int = 0


def sizes_of(model: nn.Module, config: OptimConfig) -> Sizes:
    """Of a model that ``vlm.engine.optim.freeze`` went over, before it is an engine's."""
    groups = [group["params"] for group in parameter_groups(model, config)]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return Sizes(
        tuple(tuple(p.numel() for p in group) for group in groups),
        tuple(p.numel() for p in frozen if p.is_floating_point()),
        sum(p.numel() * p.element_size() for p in frozen if not p.is_floating_point()),
    )


class Precision(NamedTuple):
    """Bytes of an element."""

    weights: int
    gradients: int
    communication: int


def precision(ds_config: dict[str, Any]) -> Precision:
    """Of a file from ``vlm.engine.ds_config.resolve``."""
    half = any(ds_config.get(name, {}).get("enabled") is True for name in ("bf16", "fp16"))
    weights = 2 if half else FP32
    accumulate = ds_config.get("data_types", {}).get("grad_accum_dtype")
    wire = ds_config.get("communication_data_type")
    return Precision(
        weights,
        weights if accumulate is None else SIZES[accumulate],
        weights if wire is None else SIZES[wire],
    )


def compute_dtype(ds_config: dict[str, Any]) -> torch.dtype:
    """What the model's weights are cast to."""
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if ds_config.get(name, {}).get("enabled") is True:
            return dtype
    return torch.float32


def variants(ds_config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The same file with every stage and offload, by name, as ds_configs/ writes them.

    Stage 0 is in fp32 and stage 1 adds gradients up in the precision of the weights: DeepSpeed
    trains wrongly otherwise.
    """
    found = {}
    for name, stage, offloads in (
        ("zero0", 0, ()),
        ("zero1", 1, ()),
        ("zero2", 2, ()),
        ("zero2_offload", 2, ("offload_optimizer",)),
        ("zero3", 3, ()),
        ("zero3_offload", 3, ("offload_optimizer", "offload_param")),
    ):
        config = copy.deepcopy(ds_config)
        zero = config["zero_optimization"]
        zero["stage"] = stage
        for part in ("offload_optimizer", "offload_param"):
            zero.pop(part, None)
        zero.update({part: {"device": "cpu", "pin_memory": True} for part in offloads})
        if stage == 0:
            for section in ("bf16", "fp16"):
                if section in config:
                    config[section]["enabled"] = False
        half = precision(config).weights < FP32
        if stage == 1 and half:
            kind = "bf16" if compute_dtype(config) == torch.bfloat16 else "fp16"
            config.setdefault("data_types", {})["grad_accum_dtype"] = kind
        found[name] = config
    return found


def state_bytes(sizes: Sizes, ds_config: dict[str, Any], world_size: int) -> StateBytes:
    """
    Args:
        ds_config: from ``vlm.engine.ds_config.resolve``.
        world_size: ranks that share out what the stage shares.
    """
    stage = ds_config["zero_optimization"]["stage"]
    if stage == 0:
        return _stage_0(sizes, ds_config, world_size)
    if stage == 3:
        return _stage_3(sizes, ds_config, world_size)
    return _stage_1_and_2(sizes, ds_config, world_size)


def _stage_0(sizes: Sizes, ds_config: dict[str, Any], world_size: int) -> StateBytes:
    size, trainable = precision(ds_config), sizes.num_trainable
    reduced = min(trainable, STAGE0_BUCKET) * size.communication if world_size > 1 else 0
    return StateBytes(
        weights=size.weights * (trainable + sum(sizes.frozen)) + sizes.packed_bytes,
        gradients=size.weights * trainable,
        optimizer=MOMENTS * trainable + COUNTER * sum(map(len, sizes.groups)),
        buckets=0,
        step_extra=reduced,
    )


def _stage_1_and_2(sizes: Sizes, ds_config: dict[str, Any], world_size: int) -> StateBytes:
    """Each group is one flat tensor, padded so that ranks share it equally."""
    size, zero = precision(ds_config), _zero(ds_config)
    flat = [_padded(sum(group), 2 * world_size) for group in sizes.groups]
    shares = [numel // world_size for numel in flat]
    weights = size.weights * (sum(flat) + sum(sizes.frozen)) + sizes.packed_bytes
    optimizer = (FP32 + MOMENTS) * sum(shares) + COUNTER * len(shares)
    largest = max(map(max, sizes.groups))
    if "offload_optimizer" in zero:
        # fp32 gradients, a copy of the new weights, and what adds up, in whole parameters
        owned = _owned(sizes, shares, world_size) if _accumulates(ds_config) else 0
        host = optimizer + (FP32 + size.weights) * sum(shares) + size.weights * (owned + largest)
        return StateBytes(
            weights, 0, 0, _bucket(zero, size.weights) + size.weights * largest, 0, host
        )
    widened = size.gradients > size.weights
    if zero["stage"] == 1:
        # whole gradients until the last micro-batch
        gradients = size.gradients * sizes.num_trainable
        staged = size.gradients if widened else size.weights
    else:
        # one flat share, or where nothing is widened, the gradients that have a part in it
        owned = sum(shares) if widened else _owned(sizes, shares, world_size)
        gradients, staged = size.gradients * owned, size.weights
    flattened = 0 if widened and zero["stage"] == 2 else size.gradients
    extra = (flattened + (FP32 if size.gradients < FP32 else 0)) * max(shares)
    return StateBytes(weights, gradients, optimizer, _bucket(zero, staged), extra)


def _stage_3(sizes: Sizes, ds_config: dict[str, Any], world_size: int) -> StateBytes:
    """Each parameter is shared out by itself; small ones and those in use are gathered."""
    size, zero = precision(ds_config), _zero(ds_config)
    shares = [[-(-numel // world_size) for numel in group] for group in sizes.groups]
    trained, numels = sum(map(sum, shares)), [n for group in sizes.groups for n in group]
    everything = [*numels, *sizes.frozen]
    kept = size.weights * (trained + sum(-(-numel // world_size) for numel in sizes.frozen))
    small = [n for n in everything if n <= zero["stage3_param_persistence_threshold"]]
    reach = zero["stage3_max_live_parameters"]
    window = max(reach, zero["stage3_prefetch_bucket_size"] + max(everything))
    live = sum(small) + min(sum(everything) - sum(small), window)
    gathered = size.weights * live if world_size > 1 else 0  # one rank's share is the whole
    pieces = [piece for group in shares for piece in _sub_groups(group, zero["sub_group_size"])]
    optimizer = (FP32 + MOMENTS) * trained + COUNTER * len(pieces)
    gradients = size.gradients * trained
    # what is sent is laid out anew for the ranks
    buckets = _bucket(zero, size.communication) * (2 if world_size > 1 else 1)
    extra = FP32 * max(pieces)
    host = 0
    if "offload_param" in zero:
        host, kept = host + kept, 0
    if "offload_optimizer" in zero:
        host += optimizer + gradients + FP32 * trained
        optimizer = gradients = extra = 0
    return StateBytes(
        kept + gathered + sizes.packed_bytes, gradients, optimizer, buckets, extra, host
    )


def _zero(ds_config: dict[str, Any]) -> dict[str, Any]:
    return {**DEFAULTS, **ds_config["zero_optimization"]}


def _accumulates(ds_config: dict[str, Any]) -> bool:
    return ds_config["gradient_accumulation_steps"] > 1


def _bucket(zero: dict[str, Any], element: int) -> int:
    # what is offloaded goes by way of the buffer, whatever the file says
    if not (zero.get("contiguous_gradients", True) or "offload_optimizer" in zero):
        return 0
    twice = 2 if zero.get("overlap_comm") else 1
    return int(zero["reduce_bucket_size"]) * element * twice


def _padded(numel: int, multiple: int) -> int:
    return math.ceil(numel / multiple) * multiple


def _owned(sizes: Sizes, shares: Sequence[int], world_size: int) -> int:
    """Elements of all parameters that have a part in a rank's shares, of the rank with most."""
    return max(
        sum(
            _overlapping(group, share * rank, share * (rank + 1))
            for group, share in zip(sizes.groups, shares, strict=True)
        )
        for rank in range(world_size)
    )


def _overlapping(group: Sequence[int], start: int, end: int) -> int:
    found = offset = 0
    for numel in group:
        if offset < end and offset + numel > start:
            found += numel
        offset += numel
    return found


def _sub_groups(shares: Sequence[int], limit: int) -> list[int]:
    """A group's shares are stepped together until they are this many elements."""
    found, size = [], 0
    for share in shares:
        size += share
        if size >= limit:
            found.append(size)
            size = 0
    return [*found, size] if size else found
