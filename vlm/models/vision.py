"""Vision encoders: frames in, one row of tokens per patch out, and keys and values to look at.

Wraps a Hugging Face tower and keeps its parameter names. The patch stream is computed block by
block from the tower's own modules, so that keys and values that a query attends to are by-products
of the pass and not a second one; ``tests/models/test_vision.py`` holds it equal to the plain model.

Legend: F frames, P tokens per frame (CLS, registers, patches), D width, A heads, Q queries.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

#: towers whose blocks a query can travel through
QUERYABLE = ("dinov2", "dinov2_with_registers", "dinov3_vit")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

#: cosines and sines (patches, D/A) of a tower with rotary positions
Rotation = tuple[Tensor, Tensor]


class KeyValue(NamedTuple):
    """What one layer's attention offers to a query."""

    #: (F, A, P, D/A)
    key: Tensor
    #: (F, A, P, D/A)
    value: Tensor

    def of_frames(self, index: Tensor) -> "KeyValue":
        return KeyValue(self.key[index], self.value[index])


class LayerInput(NamedTuple):
    """The same before it is computed: half the memory, and one more projection for each look."""

    #: (F, P, D)
    hidden: Tensor
    rotation: Rotation | None

    def of_frames(self, index: Tensor) -> "LayerInput":
        return LayerInput(self.hidden[index], self.rotation)


LayerCache = KeyValue | LayerInput


class VisionEncoder(nn.Module):
    """A DINOv2 (with or without registers) or DINOv3 tower that queries can travel through.

    ``tower`` is the Hugging Face model; its weights are all this module owns.

    Args:
        shallow: a query meets the last layer's keys and values only (the ablation of deep ones).
        sees_itself: a query attends to itself beside the frame's tokens.
        gradient_checkpointing: blocks are computed again in the backward pass, and layers' inputs
            are kept for queries in place of keys and values.
    """

    tower: Any
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        tower: nn.Module,
        *,
        shallow: bool = False,
        sees_itself: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.tower = tower
        self.shallow, self.sees_itself = shallow, sees_itself
        self.gradient_checkpointing = gradient_checkpointing
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1))

    @property
    def dim(self) -> int:
        return int(self.tower.config.hidden_size)

    @property
    def layers(self) -> nn.ModuleList:
        return self.tower.model.layer if self._is_dinov3 else self.tower.encoder.layer

    @property
    def final_norm(self) -> nn.Module:
        return self.tower.norm if self._is_dinov3 else self.tower.layernorm

    @property
    def _is_dinov3(self) -> bool:
        return self.tower.config.model_type == "dinov3_vit"

    @property
    def _patch_embedding(self) -> nn.Conv2d:
        patches = self.tower.embeddings.patch_embeddings
        return patches if self._is_dinov3 else patches.projection

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width, px."""
        height, width = self._patch_embedding.kernel_size
        return int(height), int(width)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens of a frame before its patches: CLS and registers."""
        config = self.tower.config
        return 1 + (config.num_register_tokens if hasattr(config, "num_register_tokens") else 0)

    def grid(self, frames: Tensor) -> tuple[int, int]:
        """Rows and columns of patches in (F, 3, H, W); they are the last tokens of a frame."""
        patch_height, patch_width = self.patch_size
        return frames.shape[-2] // patch_height, frames.shape[-1] // patch_width

    def normalise(self, frames: Tensor) -> Tensor:
        """(F, 3, H, W) uint8 -> the tower's dtype, ImageNet statistics."""
        dtype = self._patch_embedding.weight.dtype
        return ((frames.to(dtype) / 255 - self.mean.to(dtype)) / self.std.to(dtype)).contiguous()

    def forward(self, frames: Tensor) -> tuple[Tensor, list[LayerCache]]:
        """Runs the patch stream once.

        Args:
            frames: (F, 3, H, W) uint8.

        Returns:
            The tower's last hidden state (F, P, D) after its final norm, and of each layer what a
            query needs there: keys and values, which are projections of its normalised input.
        """
        pixels = self.normalise(frames)
        hidden = self.tower.embeddings(pixels)
        rotation = self.tower.rope_embeddings(pixels) if self._is_dinov3 else None
        lean = self._is_lean
        cache: list[LayerCache] = []
        for layer in self.layers:
            if lean:
                cache.append(LayerInput(hidden, rotation))
                hidden = _recomputed(_lean_patch_block, layer, hidden, rotation)
            else:
                hidden, kv = _patch_block(layer, hidden, rotation)
                cache.append(kv)
        return self.final_norm(hidden), cache

    def patches(self, frames: Tensor) -> Tensor:
        """(F, 3, H, W) uint8 -> (F, D, rows, columns) of the tower's last hidden state."""
        rows, columns = self.grid(frames)
        last, _ = self(frames)
        return last[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))

    def look(self, query: Tensor, cache: Sequence[LayerCache]) -> Tensor:
        """Sends one query per frame through all layers as an extra token that no patch sees.

        By default the query attends to the frame's tokens, not to itself (B-release; an
        asymmetric mask).

        Args:
            query: (F, D).
            cache: from ``forward`` on the same F frames.

        Returns:
            (F, D) after the tower's final norm.
        """
        if self.shallow:
            query = _shallow_block(self.layers[-1], query, cache[-1], self.sees_itself)
            return self.final_norm(query)
        for layer, kept in zip(self.layers, cache, strict=True):
            if isinstance(kept, LayerInput):
                query = _recomputed(_query_block, layer, query, kept, self.sees_itself)
            else:
                query = _query_block(layer, query, kept, self.sees_itself)
        return self.final_norm(query)

    @torch.no_grad()
    def attention(self, query: Tensor, cache: Sequence[LayerCache]) -> Tensor:
        """Where each query looks: (F, layers, A, P) probabilities, by the same pass as ``look``.

        What a query that sees itself gives to itself is left out. Shallow: one layer.
        """
        layers, kept = list(self.layers), cache
        if self.shallow:
            layers, kept = layers[-1:], cache[-1:]
        maps = []
        for layer, entry in zip(layers, kept, strict=True):
            q, kv = _offered(layer, query, entry, self.sees_itself)
            scores = q @ kv.key.transpose(-1, -2) * kv.key.shape[-1] ** -0.5
            maps.append(scores.softmax(-1).squeeze(2))
            query = _query_block(layer, query, entry, self.sees_itself)
        found = torch.stack(maps, dim=1)
        return found[..., :-1] if self.sees_itself else found

    @property
    def _is_lean(self) -> bool:
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()


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
    dropout = 0.0
    if layer.training:
        config = inner.config
        is_dinov3 = config.model_type == "dinov3_vit"
        dropout = config.attention_dropout if is_dinov3 else config.attention_probs_dropout_prob
    if inner is outer:
        maps = (inner.q_proj, inner.k_proj, inner.v_proj, inner.o_proj, inner.head_dim)
    else:
        maps = (inner.query, inner.key, inner.value, outer.output.dense, inner.attention_head_size)
    return Projections(*maps, dropout)


def _recomputed(block: Callable[..., Tensor], *args: Any) -> Tensor:
    return checkpoint(block, *args, use_reentrant=False)


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """(F, T, D) -> (F, A, T, D/A)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _rotate(x: Tensor, rotation: Rotation | None) -> Tensor:
    """Rotary positions of (F, A, P, D/A): of patches, which come last; not of CLS and registers."""
    if rotation is None:
        return x
    cos, sin = rotation
    num_prefix = x.shape[-2] - cos.shape[-2]
    prefix, patches = x[..., :num_prefix, :], x[..., num_prefix:, :]
    first, second = patches.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return torch.cat((prefix, patches * cos + turned * sin), dim=-2)


def _key_value(layer: Any, normed: Tensor, rotation: Rotation | None) -> KeyValue:
    """Keys and values of a layer's normalised input (F, P, D)."""
    proj = projections(layer)
    key = _rotate(_heads(proj.key(normed), proj.head_dim), rotation)
    return KeyValue(key, _heads(proj.value(normed), proj.head_dim))


def _attend(layer: Any, query: Tensor, kv: KeyValue) -> Tensor:
    """(F, A, T, D/A) queries -> (F, T, D), behind the output projection."""
    proj = projections(layer)
    mixed = F.scaled_dot_product_attention(query, kv.key, kv.value, dropout_p=proj.dropout)
    return proj.output(mixed.transpose(1, 2).flatten(2))


def _mlp_residual(layer: Any, hidden: Tensor) -> Tensor:
    return hidden + layer.drop_path(layer.layer_scale2(layer.mlp(layer.norm2(hidden))))


def _patch_block(layer: Any, hidden: Tensor, rotation: Rotation | None) -> tuple[Tensor, KeyValue]:
    """One block over (F, P, D); also its keys and values."""
    proj = projections(layer)
    normed = layer.norm1(hidden)
    kv = _key_value(layer, normed, rotation)
    query = _rotate(_heads(proj.query(normed), proj.head_dim), rotation)
    hidden = hidden + layer.drop_path(layer.layer_scale1(_attend(layer, query, kv)))
    return _mlp_residual(layer, hidden), kv


def _lean_patch_block(layer: Any, hidden: Tensor, rotation: Rotation | None) -> Tensor:
    return _patch_block(layer, hidden, rotation)[0]


def _offered(
    layer: Any, query: Tensor, kept: LayerCache, sees_itself: bool
) -> tuple[Tensor, KeyValue]:
    """A (F, D) token as an attention query (F, A, 1, D/A), and all that it attends to.

    Like CLS, it has no place in the picture: nothing of it is rotated.
    """
    normed = layer.norm1(query)[:, None]
    if isinstance(kept, LayerInput):
        kv = _key_value(layer, layer.norm1(kept.hidden), kept.rotation)
    else:
        kv = kept
    if sees_itself:
        own = _key_value(layer, normed, None)
        kv = KeyValue(*(torch.cat(pair, dim=2) for pair in zip(kv, own, strict=True)))
    proj = projections(layer)
    return _heads(proj.query(normed), proj.head_dim), kv


def _query_block(layer: Any, query: Tensor, kept: LayerCache, sees_itself: bool) -> Tensor:
    """The same block for one token per frame, (F, D), with what the frame offers."""
    mixed = _attend(layer, *_offered(layer, query, kept, sees_itself))[:, 0]
    query = query + layer.drop_path(layer.layer_scale1(mixed))
    return _mlp_residual(layer, query)


def _shallow_block(layer: Any, query: Tensor, kept: LayerCache, sees_itself: bool) -> Tensor:
    """One attention and nothing else: no residual, no MLP (ablation A1)."""
    return _attend(layer, *_offered(layer, query, kept, sees_itself))[:, 0]
