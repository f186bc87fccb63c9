"""Heads that predict the next frame's autoencoder latent from a hidden state and the last latent.

``FilmHead`` (B-older) lets the hidden state scale and shift what a small convolutional net saw in
the previous latent; ``MlpHead`` and ``CrossAttentionHead`` are the alternatives it was compared
with. All map (F, H) and (F, C, s, s) to (F, C, s, s), without a residual to the input.

Legend: F frames, H language width, C latent channels, s latent side.
"""

import torch
from torch import Tensor, nn


class FilmHead(nn.Module):
    """At H = 576 and C = 4: 1,300,612 parameters."""

    WIDTH = 512
    CHANNELS = (64, 128, 256)

    def __init__(self, dim: int, channels: int, side: int) -> None:
        super().__init__()
        first, second, third = self.CHANNELS
        self.modulation = nn.Sequential(
            nn.Linear(dim, self.WIDTH), nn.GELU(), nn.Linear(self.WIDTH, 2 * third)
        )
        self.encode = _convolutions(channels, first, second, third)
        self.decode = _convolutions(third, second, first, channels)

    def forward(self, hidden: Tensor, previous: Tensor) -> Tensor:
        gamma, beta = self.modulation(hidden)[..., None, None].chunk(2, dim=1)
        return self.decode(gamma * self.encode(previous) + beta)


class MlpHead(nn.Module):
    """At H = 576 and latents of 4 x 32 x 32: 22.17 M parameters."""

    WIDTH = 2048

    def __init__(self, dim: int, channels: int, side: int) -> None:
        super().__init__()
        size = channels * side * side
        self.net = nn.Sequential(
            nn.LayerNorm(dim + size),
            nn.Linear(dim + size, self.WIDTH),
            nn.GELU(),
            nn.Linear(self.WIDTH, self.WIDTH),
            nn.GELU(),
            nn.Linear(self.WIDTH, size),
        )

    def forward(self, hidden: Tensor, previous: Tensor) -> Tensor:
        return self.net(torch.cat([hidden, previous.flatten(1)], dim=1)).view_as(previous)


class CrossAttentionHead(nn.Module):
    """Each place of the previous latent attends to pieces of the hidden state."""

    WIDTH = 256
    HEADS = 4
    PIECES = 4

    def __init__(self, dim: int, channels: int, side: int) -> None:
        super().__init__()
        width = self.WIDTH
        self.places = nn.Embedding(side * side, width)
        self.enter = nn.Linear(channels, width)
        self.pieces = nn.Linear(dim, self.PIECES * width)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, self.HEADS, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
        )
        self.leave = nn.Linear(width, channels)

    def forward(self, hidden: Tensor, previous: Tensor) -> Tensor:
        places = torch.arange(previous[0, 0].numel(), device=previous.device)
        x = self.enter(previous.flatten(2).transpose(1, 2)) + self.places(places)  # (F, s*s, W)
        pieces = self.pieces(hidden).unflatten(1, (self.PIECES, self.WIDTH))
        x = x + self.attention(self.norm(x), pieces, pieces, need_weights=False)[0]
        x = x + self.mlp(x)
        return self.leave(x).transpose(1, 2).view_as(previous)


HEADS: dict[str, type[FilmHead] | type[MlpHead] | type[CrossAttentionHead]] = {
    "film": FilmHead,
    "mlp": MlpHead,
    "cross_attention": CrossAttentionHead,
}


def _convolutions(*channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip(channels, channels[1:], strict=False):
        layers += [nn.GELU()] if layers else []
        layers.append(nn.Conv2d(before, after, 3, padding=1))
    return nn.Sequential(*layers)
