"""What fits: memory of the GPU with most on it, by part, for every ZeRO stage and offload.

1. The heaviest micro-batches are passed through the model without contents; the one that asks for
   most counts (``vlm.estimate.activations``).
2. DeepSpeed's states come on top (``vlm.engine.memory``), frames, and what is reserved.

Not here: which micro-batches there are (``vlm.estimate.workload``), time and price
(``vlm.estimate.estimate``).
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vlm.autoencoder import shapes_of
from vlm.batch import Batch
from vlm.config import Recipe
from vlm.config_model import LatentConfig
from vlm.engine import memory
from vlm.engine.memory import Sizes, StateBytes
from vlm.estimate import workload
from vlm.estimate.activations import PassBytes, pass_bytes
from vlm.estimate.workload import Workload
from vlm.gpus import Gpu
from vlm.models.flops.shapes import Shapes

#: driver, kernels, NCCL and what the allocator cannot use: bytes, and a share of the rest
RESERVED, UNUSABLE_FRAC = 1 << 30, 0.05
#: which stage to try first
BY_SPEED = ("zero2", "zero1", "zero3", "zero2_offload", "zero3_offload", "zero0")
#: micro-batches whose frames are held beside those that are decoded ahead: the one that is
#: computed, and the next one on its way
HELD = 2


@dataclass(frozen=True)
class Hardware:
    gpu: Gpu
    nodes: int
    gpus_per_node: int
    #: share of the peak that executed operations reach
    mfu: float
    #: of one GPU for an hour; None if it is not known
    price: float | None

    @property
    def num_gpus(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Fit:
    """One stage: bytes of the GPU with most on it, by part."""

    name: str
    weights: int
    gradients: int
    optimizer: int
    buckets: int
    activations: int
    logits: int
    #: pixels of micro-batches
    frames: int
    reserved: int
    #: at the worst moment; parts that come and go are not all there at once
    total: int
    #: of the node's memory, over its ranks: offloaded states, and decoded micro-batches ahead
    host: int
    fits: bool


def fit_stages(
    model: Any,
    sizes: Sizes,
    recipe: Recipe,
    ds_config: dict[str, Any],
    work: Workload,
    hardware: Hardware,
) -> tuple[Shapes, dict[str, Fit]]:
    """The micro-batch that asks for most memory, and every stage by name."""
    stages = memory.variants(ds_config)
    dtypes = {name: memory.compute_dtype(config) for name, config in stages.items()}
    own = memory.compute_dtype(ds_config)
    worst = _worst(model, recipe, work, own)
    passes = {
        dtype: worst.bytes if dtype == own else pass_bytes(model, worst.batch, dtype, worst.mode)
        for dtype in set(dtypes.values())
    }
    frames = _frames(worst.shapes, work, recipe.model.latent_shape)
    return worst.shapes, {
        name: _fit(
            name,
            memory.state_bytes(sizes, config, hardware.num_gpus),
            passes[dtypes[name]],
            frames,
            recipe,
            hardware,
        )
        for name, config in stages.items()
    }


class Worst(NamedTuple):
    """The micro-batch and mode that ask for most memory."""

    shapes: Shapes
    batch: Batch
    mode: str
    bytes: PassBytes


def _worst(model: Any, recipe: Recipe, work: Workload, dtype: torch.dtype) -> Worst:
    """At the precision of the file given; the same micro-batch is taken for other stages."""
    per_frame, latent_shape = recipe.model.connector.tokens_per_frame, recipe.model.latent_shape
    found = [
        Worst(shapes, batch, mode, pass_bytes(model, batch, dtype, mode))
        for shapes in work.worst
        for batch in (workload.batch_of(shapes, per_frame, latent_shape),)
        for mode in list(recipe.train.modes) or [model.modes[0]]
    ]
    return max(found, key=lambda one: one.bytes.peak)


class FrameBytes(NamedTuple):
    """Pixels, and latents that came with them."""

    #: of the micro-batch that is computed, and of the next one on its way
    on_device: int
    #: of each micro-batch that is decoded ahead
    slab: int


def _frames(worst: Shapes, work: Workload, latent_shape: tuple[int, ...] | None) -> FrameBytes:
    height, width = worst.frame_size
    each = 3 * height * width
    if latent_shape is not None:
        each += torch.float16.itemsize * math.prod(latent_shape)
    own = each * max(1, worst.num_frames)
    most = each * max(1, *(shapes.num_frames for shapes in work.worst))
    return FrameBytes(own + most, most)


def _fit(
    name: str,
    states: StateBytes,
    worst: PassBytes,
    frames: FrameBytes,
    recipe: Recipe,
    hardware: Hardware,
) -> Fit:
    parts = {
        "weights": states.weights,
        "gradients": states.gradients,
        "optimizer": states.optimizer,
        "buckets": states.buckets,
        "activations": worst.activations,
        "logits": worst.logits,
        "frames": frames.on_device,
    }
    kept = states.weights + states.gradients + states.optimizer
    backward, step = sum(parts.values()), kept + states.step_extra + parts["frames"]
    reserved = int(RESERVED + UNUSABLE_FRAC * max(backward, step))
    total = max(backward, step) + reserved
    slabs = (recipe.data.prefetch + HELD) * frames.slab
    return Fit(
        name=name,
        **parts,
        reserved=reserved,
        total=total,
        host=hardware.gpus_per_node * (states.host + slabs),
        fits=total <= hardware.gpu.memory_gib * 2**30,
    )


def stage_name(ds_config: dict[str, Any]) -> str:
    """What ds_configs/ calls a file of this stage and offload."""
    zero = ds_config["zero_optimization"]
    offloads = any(
        zero.get(part, {}).get("device", "none") != "none"
        for part in ("offload_optimizer", "offload_param")
    )
    return f"zero{zero['stage']}{'_offload' if offloads else ''}"


def sizes_of(model: Any, recipe: Recipe) -> Sizes:
    """An autoencoder that makes latents is no part of the model; it lies beside it as it is."""
    sizes, connector = memory.sizes_of(model, recipe.optim), recipe.model.connector
    if not isinstance(connector, LatentConfig) or connector.autoencoder is None:
        return sizes
    own = sum(p.nbytes for p in shapes_of(connector.autoencoder).model.parameters())
    return sizes._replace(packed_bytes=sizes.packed_bytes + own)


def advice(chosen: str, fits: dict[str, Fit], recipe: Recipe, hardware: Hardware) -> str:
    """One line: that it fits, or what to change first."""
    if fits[chosen].fits:
        return f"{chosen} fits"
    if better := [name for name in BY_SPEED if fits[name].fits]:
        return f"{chosen} does not fit: use ds_configs/{better[0]}.json"
    smallest = min(fits.values(), key=lambda one: one.total)
    over = smallest.total - hardware.gpu.memory_gib * 2**30
    passing = smallest.activations + smallest.logits + smallest.frames
    plain = [
        part
        for part in ("vision", "language", "connector")
        if not recipe.model.model_dump()[part].get("gradient_checkpointing", True)
    ]
    if plain and passing > over:
        switches = " ".join(f"model.{part}.gradient_checkpointing=true" for part in plain)
        return f"no stage fits: set {switches}"
    if passing > over:
        budget = int(recipe.data.budget * (1 - 1.1 * over / passing))
        if budget > 0:
            return f"no stage fits: lower data.budget from {recipe.data.budget} to about {budget}"
    return (
        f"no stage fits: {smallest.name} needs {smallest.total / 2**30:.0f} GiB of "
        f"{hardware.gpu.memory_gib:.0f}; take more or larger GPUs, freeze a component, or train "
        "adapters"
    )
