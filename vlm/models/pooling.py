"""Pooling: the connector of the baselines that give every frame a fixed grid of tokens.

``pool`` averages patches over a g x g grid and projects them (B-release's ablations B1 and B2);
``pixel_shuffle`` lays s x s neighbours into one token and sends it through an MLP (older).

Legend: F frames, D vision width, h x w patches of a frame, K tokens of a frame, H language width.
"""

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from vlm.errors import ConfigError

#: width of the MLP, in language widths
MLP_WIDTH = 4


class Pooling(nn.Module):
    """Patches in, ``tokens_per_frame`` visual tokens out."""

    def __init__(
        self,
        *,
        vision_dim: int,
        language_dim: int,
        tokens_per_frame: int,
        reduction: Literal["pool", "pixel_shuffle"],
        shuffle: int,
        visual_scale: float,
    ) -> None:
        super().__init__()
        self.visual_scale = visual_scale
        self.side = math.isqrt(tokens_per_frame)
        self.shuffle = shuffle if reduction == "pixel_shuffle" else None
        if self.shuffle is None:
            self.to_language: nn.Module = nn.Linear(vision_dim, language_dim)
        else:
            width = MLP_WIDTH * language_dim
            self.to_language = nn.Sequential(
                nn.Linear(vision_dim * self.shuffle**2, width),
                nn.SiLU(),
                nn.Linear(width, language_dim),
            )

    def forward(self, patches: Tensor) -> Tensor:
        """(F, D, h, w) -> (F * K, H), frame by frame, row by row.

        Raises:
            ConfigError: the patches do not make that many tokens.
        """
        height, width = patches.shape[-2:]
        self._check(height, width)
        if self.shuffle is None:
            grid = F.adaptive_avg_pool2d(patches, self.side)
        else:
            grid = F.pixel_unshuffle(patches, self.shuffle)
        return self.visual_scale * self.to_language(grid.flatten(2).transpose(1, 2).flatten(0, 1))

    def _check(self, height: int, width: int) -> None:
        wanted = f"{self.side} x {self.side} (model.connector.tokens_per_frame {self.side**2})"
        found = f"frames of {height} x {width} patches"
        if self.shuffle is None:
            if min(height, width) < self.side:
                raise ConfigError(
                    f"{found} cannot be pooled to {wanted}; take larger frames, or fewer tokens"
                )
        elif (height, width) != (self.side * self.shuffle,) * 2:
            raise ConfigError(
                f"{found}, {self.shuffle} x {self.shuffle} of them in a token, do not make "
                f"{wanted}; set it to the number of patches over {self.shuffle**2}"
            )
