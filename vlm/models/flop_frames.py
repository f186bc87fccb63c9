"""Operations of a frame in a tower and connector of any make, counted by torch on the meta device.

For families that read every frame once and alike (``vlm.models.one_pass.Projected``): one frame
goes through a twin of the model without contents, forward and backward, under
``torch.utils.flop_counter``; a micro-batch costs as much for each frame. Where it can be told from
sizes alone, ``vlm.models.flop_parts`` does.

Legend: H, W height and width of frames in pixels.
"""

import functools
import json
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from vlm.models.flop_blocks import Flops


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
    vision, tokens = _run(twin.vision, frame)
    if recomputes and tokens.requires_grad:
        twin.vision.gradient_checkpointing = True
        again, _ = _run(twin.vision, frame)
        vision.recompute = again.useful - vision.useful
    given = tokens.detach().requires_grad_(tokens.requires_grad)
    connector, visual = _run(twin.connector, given)
    return FrameFlops(vision, connector, visual.shape[1], visual.requires_grad)


def _run(module: nn.Module, given: Tensor) -> tuple[Flops, Tensor]:
    """Forward and backward, and what came out."""
    with FlopCounterMode(display=False) as counter:
        found = module(given)
        forward = counter.get_total_flops()
        if found.requires_grad:
            found.sum().backward()
        both = counter.get_total_flops()
    return Flops(forward, both - forward), found
