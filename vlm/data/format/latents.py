"""Latents of frames, for models that predict what the next frame looks like to an autoencoder.

``KEY.latents.safetensors`` beside the frames holds one tensor, ``latents``: (T, C, h, w) float16,
the mean of the posterior of any diffusers ``AutoencoderKL``, shifted and scaled as its
configuration says; T is the number of frames. A mean is the same every time, a draw would not be.

``diffusers`` is optional (``pip install saccade[latents]``). Not here: frames
(`vlm.data.format.frames`), where the member stands in a shard (`vlm.data.format.shards`).
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError

from vlm.autoencoder import Autoencoder
from vlm.errors import ConfigError, SampleError

MAX_LATENTS_BYTES = 64 << 20
_TENSOR = "latents"
#: frames that are encoded at once
_BATCH = 8


class LatentEncoder:
    """An autoencoder of the diffusers library, on the GPU if there is one."""

    def __init__(self, name: str) -> None:
        """Loads it.

        Args:
            name: Folder or Hugging Face id of an ``AutoencoderKL``, itself or in ``vae/``.

        Raises:
            ConfigError: diffusers is not installed, or there is no such model.
        """
        self.autoencoder = Autoencoder(name)

    def check_size(self, size: int) -> None:
        """ConfigError unless frames of this size have whole latents."""
        if size % self.autoencoder.stride:
            stride = self.autoencoder.stride
            raise ConfigError(f"size {size}: expected a multiple of the latents' {stride}")

    def encode(self, frames: Sequence[np.ndarray]) -> bytes:
        """The member of a sample.

        Args:
            frames: 1 or more, each (H, W, 3) uint8, RGB.

        Raises:
            SampleError: the autoencoder gave a number that float16 does not hold.
        """
        pixels = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)  # (T, 3, H, W)
        parts = [self.autoencoder.encode(batch).half().cpu() for batch in pixels.split(_BATCH)]
        latents = torch.cat(parts)  # (T, C, H / stride, W / stride)
        if not torch.isfinite(latents).all():
            raise SampleError("latents that are not finite")
        # safetensors writes memory as it lies, and convolutions may leave channels last
        return safetensors.numpy.save({_TENSOR: latents.contiguous().numpy()})


@lru_cache(maxsize=1)
def encoder(name: str) -> LatentEncoder:
    """The one encoder that a worker process keeps."""
    return LatentEncoder(name)


def read_latents(body: bytes | memoryview, num_frames: int, where: str) -> np.ndarray:
    """The latents of a sample, from its member.

    Args:
        body: The member's bytes, trusted in no way.
        where: Shard, key and member, for the error.

    Returns:
        (T, C, h, w) float16, finite.

    Raises:
        SampleError: damaged, too large, or not the latents of ``num_frames`` frames.
    """
    if len(body) > MAX_LATENTS_BYTES:
        raise SampleError(f"{where}: {len(body)} bytes, at most {MAX_LATENTS_BYTES} are read")
    try:
        tensors = safetensors.numpy.load(bytes(body))
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise SampleError(f"{where}: not safetensors: {error}") from None
    if set(tensors) != {_TENSOR}:
        raise SampleError(f"{where}: found tensors {sorted(tensors)[:4]}; expected {_TENSOR}")
    latents = tensors[_TENSOR]
    if latents.dtype != np.float16 or latents.ndim != 4 or len(latents) != num_frames:
        raise SampleError(
            f"{where}: found {latents.dtype} {latents.shape}; expected float16 (T, C, h, w) with "
            f"T = {num_frames} frames"
        )
    if not np.isfinite(latents).all():
        raise SampleError(f"{where}: holds numbers that are not finite")
    return latents
