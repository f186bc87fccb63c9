"""Any Hugging Face vision tower, read once as a whole: frames in, a row of tokens for each out.

For families whose language model does not look back at the tower; those that do wrap its blocks
(``vlm.models.vision``). What differs between towers stands in ``TOWERS``.

Legend: F frames, P tokens of a frame, D width.
"""

from operator import attrgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vlm.errors import DataError
from vlm.models.vision import IMAGENET_MEAN, IMAGENET_STD

Reads = Literal["all", "cls", "patches"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


class TowerKind(NamedTuple):
    """Where a model type keeps its parts, and what its pixels look like."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    #: attribute with the list of its blocks
    layers: str
    #: tokens of a frame before its patches, beside registers
    num_prefix_tokens: int
    #: attribute of its learned position embeddings, if it has any
    positions: str | None
    #: a final norm that transformers applies to the pooled token only
    late_norm: str | None = None
    #: whether frames may have another size than its config says
    any_size: bool = False


TOWERS = {
    "clip_vision_model": TowerKind(
        CLIP_MEAN,
        CLIP_STD,
        "encoder.layers",
        1,
        "embeddings.position_embedding.weight",
        "post_layernorm",
    ),
    "siglip_vision_model": TowerKind(
        HALF, HALF, "encoder.layers", 0, "embeddings.position_embedding.weight"
    ),
    "vit": TowerKind(HALF, HALF, "layers", 1, "embeddings.position_embeddings"),
    "dinov2": TowerKind(
        IMAGENET_MEAN,
        IMAGENET_STD,
        "encoder.layer",
        1,
        "embeddings.position_embeddings",
        any_size=True,
    ),
    "dinov2_with_registers": TowerKind(
        IMAGENET_MEAN,
        IMAGENET_STD,
        "encoder.layer",
        1,
        "embeddings.position_embeddings",
        any_size=True,
    ),
    "dinov3_vit": TowerKind(IMAGENET_MEAN, IMAGENET_STD, "model.layer", 1, None, any_size=True),
}


class Tower(nn.Module):
    """Owns one vision tower (``tower``), its parameter names unchanged.

    Args:
        reads: which tokens of a frame are handed on.
    """

    tower: Any
    mean: Tensor
    std: Tensor

    def __init__(self, tower: nn.Module, reads: Reads = "all") -> None:
        super().__init__()
        self.tower, self.reads = tower, reads
        self.kind = TOWERS[self.tower.config.model_type]
        self.register_buffer("mean", torch.tensor(self.kind.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(self.kind.std).view(3, 1, 1))
        if hasattr(self.tower, "pooler"):
            self.tower.pooler = None  # nobody reads it: it would train without a gradient

    @property
    def dim(self) -> int:
        return int(self.tower.config.hidden_size)

    @property
    def layers(self) -> nn.ModuleList:
        return attrgetter(self.kind.layers)(self.tower)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens of a frame before its patches: CLS and registers."""
        config = self.tower.config
        registers = config.num_register_tokens if hasattr(config, "num_register_tokens") else 0
        return self.kind.num_prefix_tokens + registers

    @property
    def num_tokens(self) -> int:
        """Tokens of a frame of the size in the tower's config that are handed on."""
        config = self.tower.config
        if self.reads == "cls":
            return 1
        patches = (config.image_size // config.patch_size) ** 2
        return patches + (self.num_prefix_tokens if self.reads == "all" else 0)

    @property
    def gradient_checkpointing(self) -> bool:
        return bool(self.tower.is_gradient_checkpointing)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, wanted: bool) -> None:
        if wanted:
            self.tower.gradient_checkpointing_enable({"use_reentrant": False})

    def train(self, mode: bool = True) -> "Tower":
        """A frozen tower stays as it is at inference, without dropout."""
        return super().train(mode and any(p.requires_grad for p in self.parameters()))

    def normalise(self, frames: Tensor) -> Tensor:
        """(F, 3, H, W) uint8 -> the tower's dtype, by the statistics it was trained with."""
        dtype = next(self.tower.parameters()).dtype
        return ((frames.to(dtype) / 255 - self.mean.to(dtype)) / self.std.to(dtype)).contiguous()

    def forward(self, frames: Tensor) -> Tensor:
        """(F, 3, H, W) uint8 -> (F, P, D) tokens after the final norm.

        Raises:
            DataError: the tower has no positions for frames of that size.
        """
        size = int(self.tower.config.image_size)
        if not self.kind.any_size and frames.shape[-2:] != (size, size):
            height, width = frames.shape[-2:]
            raise DataError(
                f"frames of {height} x {width} pixels, but the vision tower takes {size} x {size}; "
                f"build the manifests with --size {size}"
            )
        tokens = self.tower(pixel_values=self.normalise(frames)).last_hidden_state
        if self.kind.late_norm is not None:
            tokens = attrgetter(self.kind.late_norm)(self.tower)(tokens)
        if self.reads == "cls":
            return tokens[:, :1]
        return tokens[:, self.num_prefix_tokens :] if self.reads == "patches" else tokens
