"""A frozen ``AutoencoderKL`` of the diffusers library: frames to scaled latents and back.

A latent is the mean of the posterior, shifted and scaled as its configuration says; a mean is the
same every time, a draw would not be. ``diffusers`` is optional (``pip install saccade[latents]``).
Not here: latents in shards (``vlm.data.format.latents``), what is learned from them
(``vlm.models``).
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vlm.errors import ConfigError


class Autoencoder:
    """Not a module: it never trains, and is no part of what is saved."""

    def __init__(self, name: str, *, shapes_only: bool = False) -> None:
        """Loads it.

        Args:
            name: Folder or Hugging Face id of an ``AutoencoderKL``, itself or in ``vae/``.
            shapes_only: on the meta device.

        Raises:
            ConfigError: diffusers is not installed, or there is no such model.
        """
        self.model = _load(name, shapes_only)
        config = self.model.config
        self.scale = float(config.scaling_factor)
        self.shift = float(config.shift_factor or 0.0)
        #: pixels on a side of one latent
        self.stride = 2 ** (len(config.block_out_channels) - 1)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """(F, 3, H, W) uint8 -> (F, C, H / stride, W / stride)."""
        scaled = frames.to(self.model.device, self.model.dtype) / 127.5 - 1
        return (self.model.encode(scaled).latent_dist.mean - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(F, C, h, w) -> (F, 3, H, W) uint8."""
        given = latents.to(self.model.device, self.model.dtype) / self.scale + self.shift
        return ((self.model.decode(given).sample + 1) * 127.5).round().clamp(0, 255).byte()


@lru_cache(maxsize=1)
def autoencoder(name: str) -> Autoencoder:
    """The one that a process keeps."""
    return Autoencoder(name)


@lru_cache(maxsize=1)
def shapes_of(name: str) -> Autoencoder:
    """The same on the meta device: no weights are read, and latents have a shape only."""
    return Autoencoder(name, shapes_only=True)


def _load(name: str, shapes_only: bool) -> Any:
    try:
        # an optional dependency
        from diffusers import AutoencoderKL
    except ImportError:
        raise ConfigError(
            "latents need diffusers, which is not installed; pip install saccade[latents]"
        ) from None
    problems = []
    for folder in (None, "vae"):
        try:
            if shapes_only:
                config = AutoencoderKL.load_config(name, subfolder=folder)
                with torch.device("meta"):
                    return AutoencoderKL.from_config(config).eval()
            model = AutoencoderKL.from_pretrained(name, subfolder=folder, use_safetensors=True)
        except (OSError, ValueError) as error:
            problems.append(str(error))
        else:
            return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    raise ConfigError(f"latents {name}: no AutoencoderKL in safetensors: {problems[0]}")
