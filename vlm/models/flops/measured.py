"""Operations of a frame in modules of any make, counted by torch on the meta device.

For families that read every frame once and alike (``vlm.models.one_pass``): one frame goes
through a twin of the model without contents, forward and backward, under
``torch.utils.flop_counter``; a micro-batch costs as much for each frame. So do heads that predict
latents, and the autoencoder that makes them. Looks depend on queries besides:
``vlm.models.flops.looks`` counts them from sizes alone.

Legend: H, W height and width of frames in pixels.
"""

import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from vlm.autoencoder import shapes_of
from vlm.models.baselines import MultiTokenModel
from vlm.models.flops.layers import Flops
from vlm.models.latent import LatentFoveation


class FrameFlops(NamedTuple):
    """Of one frame."""

    vision: Flops
    connector: Flops
    #: what the connector makes of it
    num_tokens: int
    #: whether visual tokens ask for a gradient
    grad: bool


def of_frame(model: PreTrainedModel, frame_size: tuple[int, int]) -> FrameFlops:
    """As the model trains now; counted once for each size and each way to train."""
    trained = tuple(
        name
        for part in ("vision", "connector")
        for name, p in model.get_submodule(part).named_parameters(part)
        if p.requires_grad
    )
    family: Any = type(model)
    recomputes = model.vision.gradient_checkpointing
    return _of_frame(family, model.config.to_json_string(), trained, recomputes, frame_size)


@functools.lru_cache(maxsize=32)
def _of_frame(
    family: Any, config: str, trained: tuple[str, ...], recomputes: bool, size: tuple[int, int]
) -> FrameFlops:
    parts, names = family.config_class.from_dict(json.loads(config)), set(trained)
    parts.base = None  # a language model without weights will do, whatever adapters stand on
    with torch.device("meta"):
        twin = family(parts)
        frame = torch.zeros(1, 3, *size, dtype=torch.uint8)
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(name in names)
    twin.train()
    reads = twin.vision.patches if isinstance(twin, MultiTokenModel) else twin.vision
    vision, tokens = _run(reads, frame)
    if recomputes and tokens.requires_grad:
        twin.vision.gradient_checkpointing = True
        again, _ = _run(reads, frame)
        vision.recompute = again.useful - vision.useful
    given = tokens.detach().requires_grad_(tokens.requires_grad)
    connector, visual = _run(twin.connector, given)
    return FrameFlops(vision, connector, visual.numel() // visual.shape[-1], visual.requires_grad)


def of_prediction(connector: LatentFoveation, grad: bool) -> Flops:
    """Of one latent that is predicted; ``grad``: the state before its frame asks for a gradient."""
    head, shape = connector.head, connector.latent_shape
    trained = tuple(name for name, p in head.named_parameters() if p.requires_grad)
    dim, start = connector.llm_to_query.in_features, connector.z_vae_init.weight.requires_grad
    family: Any = type(head)
    return _of_prediction(family, dim, shape, trained, grad, start)


@functools.lru_cache(maxsize=32)
def _of_prediction(
    family: Any,
    dim: int,
    shape: tuple[int, int, int],
    trained: tuple[str, ...],
    grad: bool,
    start: bool,
) -> Flops:
    with torch.device("meta"):
        head = family(dim, *shape[:2])
        state, previous = torch.zeros(1, dim), torch.zeros(1, *shape)
    for name, parameter in head.named_parameters():
        parameter.requires_grad_(name in trained)
    return _run(head, state.requires_grad_(grad), previous.requires_grad_(start))[0]


@functools.lru_cache(maxsize=4)
def of_latent(name: str, size: tuple[int, int]) -> Flops:
    """Of a frozen autoencoder that makes one frame's latent."""
    frame = torch.zeros(1, 3, *size, dtype=torch.uint8, device="meta")
    return _run(shapes_of(name).encode, frame)[0]


def _run(module: Callable[..., Tensor], *given: Tensor) -> tuple[Flops, Tensor]:
    """Forward and backward, and what came out."""
    with FlopCounterMode(display=False) as counter:
        found = module(*given)
        forward = counter.get_total_flops()
        if found.requires_grad:
            found.sum().backward()
        both = counter.get_total_flops()
    return Flops(forward, both - forward), found
