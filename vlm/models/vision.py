"""Vision encoders: frames in, one row of tokens per patch out, and keys and values to look at.

Wraps a Hugging Face tower and keeps its parameter names. The patch stream is computed block by
block from the tower's own modules, so that keys and values that a query attends to are by-products
of the pass and not a second one; ``tests/models/test_vision.py`` holds it equal to the plain model.

Legend: F frames, P tokens per frame (CLS, registers, patches), D width, A heads, Q queries.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

#: towers whose blocks a query can travel through
QUERYABLE = ("dinov2", "dinov2_with_registers")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class KeyValue(NamedTuple):
    """What one layer's attention offers to a query."""

    #: (F, A, P, D/A)
    key: Tensor
    #: (F, A, P, D/A)
    value: Tensor


class VisionEncoder(nn.Module):
    """A DINOv2 tower (with or without registers) that queries can travel through.

    ``tower`` is the Hugging Face model; its weights are all this module owns.
    """

    tower: Any
    mean: Tensor
    std: Tensor

    def __init__(self, tower: nn.Module, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.tower = tower
        self.gradient_checkpointing = gradient_checkpointing
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1))

    @property
    def dim(self) -> int:
        return int(self.tower.config.hidden_size)

    def grid(self, frames: Tensor) -> tuple[int, int]:
        """Rows and columns of patches in (F, 3, H, W); they are the last tokens of a frame."""
        patch_height, patch_width = self.tower.embeddings.patch_embeddings.patch_size
        return frames.shape[-2] // patch_height, frames.shape[-1] // patch_width

    def normalise(self, frames: Tensor) -> Tensor:
        """(F, 3, H, W) uint8 -> the tower's dtype, ImageNet statistics."""
        dtype = self.tower.embeddings.patch_embeddings.projection.weight.dtype
        return ((frames.to(dtype) / 255 - self.mean.to(dtype)) / self.std.to(dtype)).contiguous()

    def forward(self, frames: Tensor) -> tuple[Tensor, list[KeyValue]]:
        """Runs the patch stream once.

        Args:
            frames: (F, 3, H, W) uint8.

        Returns:
            The tower's last hidden state (F, P, D) after its final norm, and each layer's keys
            and values, which are projections of that layer's normalised input.
        """
        hidden = self.tower.embeddings(self.normalise(frames))
        cache = []
        for layer in self.tower.encoder.layer:
            if self.gradient_checkpointing and self.training:
                hidden, key, value = checkpoint(_patch_block, layer, hidden, use_reentrant=False)
            else:
                hidden, key, value = _patch_block(layer, hidden)
            cache.append(KeyValue(key, value))
        return self.tower.layernorm(hidden), cache

    def look(self, query: Tensor, cache: list[KeyValue]) -> Tensor:
        """Sends one query per frame through all layers as an extra token that no patch sees.

        The query attends to the frame's tokens, not to itself (B-release; an asymmetric mask).

        Args:
            query: (F, D).
            cache: from ``forward`` on the same F frames.

        Returns:
            (F, D) after the tower's final norm.
        """
        for layer, kv in zip(self.tower.encoder.layer, cache, strict=True):
            query = _query_block(layer, query, kv)
        return self.tower.layernorm(query)

    @torch.no_grad()
    def attention(self, query: Tensor, cache: list[KeyValue]) -> Tensor:
        """Where each query looks: (F, layers, A, P) probabilities, by the same pass as ``look``."""
        maps = []
        for layer, kv in zip(self.tower.encoder.layer, cache, strict=True):
            q = _heads(projections(layer).query(layer.norm1(query))[:, None], kv.key.shape[-1])
            scores = q @ kv.key.transpose(-1, -2) * kv.key.shape[-1] ** -0.5
            maps.append(scores.softmax(-1).squeeze(2))
            query = _query_block(layer, query, kv)
        return torch.stack(maps, dim=1)


class Projections(NamedTuple):
    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module
    head_dim: int
    #: of attention probabilities, 0 outside training
    dropout: float


def projections(layer: Any) -> Projections:
    """The attention's four linear maps; transformers named them anew within version 5."""
    outer = layer.attention
    inner = outer if hasattr(outer, "q_proj") else outer.attention
    dropout = inner.config.attention_probs_dropout_prob if layer.training else 0.0
    if inner is outer:
        maps = (inner.q_proj, inner.k_proj, inner.v_proj, inner.o_proj, inner.head_dim)
    else:
        maps = (inner.query, inner.key, inner.value, outer.output.dense, inner.attention_head_size)
    return Projections(*maps, dropout)


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """(F, T, D) -> (F, A, T, D/A)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _mlp_residual(layer: Any, hidden: Tensor) -> Tensor:
    return hidden + layer.drop_path(layer.layer_scale2(layer.mlp(layer.norm2(hidden))))


def _patch_block(layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One DINOv2 block over (F, P, D); also its keys and values (F, A, P, D/A)."""
    proj = projections(layer)
    normed = layer.norm1(hidden)
    query = _heads(proj.query(normed), proj.head_dim)
    key = _heads(proj.key(normed), proj.head_dim)
    value = _heads(proj.value(normed), proj.head_dim)
    mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=proj.dropout)
    mixed = proj.output(mixed.transpose(1, 2).flatten(2))
    hidden = hidden + layer.drop_path(layer.layer_scale1(mixed))
    return _mlp_residual(layer, hidden), key, value


def _query_block(layer: Any, query: Tensor, kv: KeyValue) -> Tensor:
    """The same block for one token per frame, (F, D), with the frame's keys and values."""
    proj = projections(layer)
    q = _heads(proj.query(layer.norm1(query))[:, None], proj.head_dim)
    mixed = F.scaled_dot_product_attention(q, kv.key, kv.value, dropout_p=proj.dropout)
    mixed = proj.output(mixed.transpose(1, 2).flatten(1))
    query = query + layer.drop_path(layer.layer_scale1(mixed))
    return _mlp_residual(layer, query)
