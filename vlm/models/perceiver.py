"""The perceiver family: a few latents read each image and stand for it in the text (AnyMAL).

The resampler attends from latents to the tower's tokens, block by block; the linear projector is
what it is judged against. Where the visual tokens stand is the batch's business: at the
placeholders in the text, or before it.

Legend: F frames, P tokens of a frame, D vision width, K visual tokens of a frame, H language width,
A heads.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.errors import ConfigError
from vlm.models.family import FamilyConfig
from vlm.models.one_pass import Projected

#: heads of the learned pooling
POOL_HEADS = 8
LATENT_STD = 0.02


class PerceiverFamilyConfig(FamilyConfig):  # transformers has a PerceiverConfig
    model_type = "saccade_perceiver"


class PerceiverModel(Projected):
    """Vision tower, perceiver resampler (or linear projector), language model."""

    config_class = PerceiverFamilyConfig

    def make_connector(self, keys: dict[str, Any]) -> nn.Module:
        dims = {"vision_dim": self.vision.dim, "language_dim": self.language.dim}
        num_tokens, num_layers = keys["tokens_per_frame"], keys["num_layers"]
        if keys["kind"] == "linear":
            pool = keys["pool"]
            check_tokens(num_tokens, self.vision.num_tokens, pool != "none")
            return Projector(**dims, num_tokens=num_tokens, num_layers=num_layers, pool=pool)
        return Resampler(
            **dims,
            num_latents=num_tokens,
            num_layers=num_layers,
            num_heads=keys["num_heads"],
            mlp_ratio=keys["mlp_ratio"],
        )


def check_tokens(wanted: int, found: int, pooled: bool) -> None:
    """
    Raises:
        ConfigError: a tower's ``found`` tokens do not make ``wanted`` ones.
    """
    if wanted > found if pooled else wanted != found:
        rule = "at most" if pooled else "all of"
        raise ConfigError(
            f"model.connector.tokens_per_frame: found {wanted}, but the vision tower gives {found} "
            f"tokens for a frame; expected {rule} those"
        )


def check_heads(key: str, num_heads: int, dim: int) -> None:
    """
    Raises:
        ConfigError: the language model's width ``dim`` does not divide into heads.
    """
    if dim % num_heads:
        raise ConfigError(
            f"model.connector.{key}: found {num_heads} heads, expected a divisor of the language "
            f"model's width {dim}"
        )


class Resampler(nn.Module):
    """Latents that read a frame's tokens: (F, P, D) -> (F, K, H).

    Pre-norm blocks of cross-attention (keys are the context alone), self-attention and MLP.
    """

    def __init__(
        self,
        *,
        vision_dim: int,
        language_dim: int,
        num_latents: int,
        num_layers: int,
        num_heads: int,
        mlp_ratio: int,
    ) -> None:
        super().__init__()
        check_heads("num_heads", num_heads, language_dim)
        self.latents = nn.Parameter(torch.randn(num_latents, language_dim) * LATENT_STD)
        self.input_proj = nn.Linear(vision_dim, language_dim)
        self.blocks = nn.ModuleList(
            ResamplerBlock(language_dim, num_heads, mlp_ratio) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(language_dim)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Args:
            tokens: (F, P, D).
            mask: (F, P), False at tokens that nothing may read; None: all are read.
        """
        context = self.input_proj(tokens)
        latents = self.latents.expand(len(tokens), -1, -1)
        for block in self.blocks:
            latents = block(latents, context, mask)
        return self.norm(latents)


class ResamplerBlock(nn.Module):
    """z + MHA(LN z, LN x); z + MHA(LN z, LN z); z + MLP(LN z)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.latent_norm, self.context_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.cross_attention = Attention(dim, num_heads)
        self.self_norm = nn.LayerNorm(dim)
        self.self_attention = Attention(dim, num_heads)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, mlp_ratio * dim),
            nn.GELU(),
            nn.Linear(mlp_ratio * dim, dim),
        )

    def forward(self, latents: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """(F, K, H) and (F, P, H) -> (F, K, H)."""
        read = self.cross_attention(self.latent_norm(latents), self.context_norm(context), mask)
        latents = latents + read
        normed = self.self_norm(latents)
        latents = latents + self.self_attention(normed, normed)
        return latents + self.mlp(latents)


class Attention(nn.Module):
    """Multi-head attention with biases: (F, K, H) and (F, P, H) -> (F, K, H)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.value, self.output = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            self._heads(values)
            for values in (self.query(x), self.key(context), self.value(context))
        )
        kept = None if mask is None else mask[:, None, None, :]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=kept)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """(F, T, H) -> (F, A, T, H/A)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class Projector(nn.Module):
    """The linear baseline: LN, then one or two maps, then pooled tokens: (F, P, D) -> (F, K, H).

    ``avg`` takes means of P // K neighbours, the last K of them, so that CLS gives way first;
    ``learned`` lets K queries attend to the normalised tokens.
    """

    def __init__(
        self, *, vision_dim: int, language_dim: int, num_tokens: int, num_layers: int, pool: str
    ) -> None:
        super().__init__()
        self.num_tokens, self.pool = num_tokens, pool
        more = [nn.GELU(), nn.Linear(language_dim, language_dim)] if num_layers == 2 else []
        self.maps = nn.Sequential(
            nn.LayerNorm(vision_dim), nn.Linear(vision_dim, language_dim), *more
        )
        if pool == "learned":
            check_heads("pool", POOL_HEADS, language_dim)
            self.queries = nn.Parameter(torch.randn(num_tokens, language_dim) * LATENT_STD)
            self.key_norm = nn.LayerNorm(language_dim)
            self.attention = Attention(language_dim, POOL_HEADS)

    def forward(self, tokens: Tensor) -> Tensor:
        mapped = self.maps(tokens)
        if self.pool == "avg":
            group = mapped.shape[1] // self.num_tokens
            kept = mapped[:, -group * self.num_tokens :]
            return kept.unflatten(1, (self.num_tokens, group)).mean(2)
        if self.pool == "learned":
            queries = self.queries.expand(len(mapped), -1, -1)
            return self.attention(queries, self.key_norm(mapped))
        return mapped
