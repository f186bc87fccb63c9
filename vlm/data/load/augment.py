"""Changes to training frames that leave every answer true. Pure: the same draw, the same frames.

One draw per sample, not per frame, so that motion stays what it is. Not here: flips, which turn
left into right.
"""

import numpy as np

from vlm.config import AugmentConfig


def augment(frames: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """(T, H, W, 3) uint8 -> the same shape and type, shifted, brighter and with other contrast."""
    if config.shift_px:
        frames = _shift(frames, *rng.integers(-config.shift_px, config.shift_px + 1, 2))
    if config.contrast or config.brightness:
        gain = 1 + rng.uniform(-config.contrast, config.contrast)
        offset = 255 * rng.uniform(-config.brightness, config.brightness)
        table = (np.arange(256) * gain + offset).clip(0, 255).astype(np.uint8)
        frames = table[frames]
    return frames


def _shift(frames: np.ndarray, down: int, right: int) -> np.ndarray:
    """Moves pixels down and right, repeating the border."""
    _, height, width, _ = frames.shape
    rows = (np.arange(height) - down).clip(0, height - 1)
    columns = (np.arange(width) - right).clip(0, width - 1)
    return frames[:, rows][:, :, columns]
