"""Attention maps as images for the report page and ``vlm.evaluate.look_pictures``.

Not here: the frames below them (`vlm.page`) and how the page lays one over the other.
"""

import io

import numpy as np
from PIL import Image

from vlm.page import data_uri

#: attention from none to most, as red, green, blue, opacity: the dark dims what nobody looked at
_HEAT = np.array(
    [
        (8, 6, 26, 105),
        (87, 16, 110, 115),
        (188, 55, 84, 125),
        (249, 142, 9, 140),
        (252, 255, 164, 155),
    ],
    dtype=np.float64,
)


def heat_uri(attention: np.ndarray) -> str:
    """One pixel per cell of a (gh, gw) map: a PNG to be stretched over the frame, hard-edged."""
    buffer = io.BytesIO()
    Image.fromarray(heat_colours(attention)).save(buffer, "PNG", optimize=True)
    return data_uri("png", buffer.getvalue())


def heat_colours(attention: np.ndarray) -> np.ndarray:
    """(gh, gw) -> (gh, gw, 4) uint8, scaled to the strongest cell."""
    weights = clean_attention(attention)
    share = weights / (weights.max() or 1.0)
    steps = np.linspace(0, 1, len(_HEAT))
    rgba = np.stack([np.interp(share, steps, channel) for channel in _HEAT.T], axis=-1)
    return rgba.round().astype(np.uint8)


def peak(attention: np.ndarray) -> float:
    """How many times its even share the strongest cell gets: 1 is uniform, 0 means no attention."""
    weights = clean_attention(attention)
    return float(weights.max() / weights.mean()) if weights.any() else 0.0


def clean_attention(attention: np.ndarray) -> np.ndarray:
    """As float64, with zero for what is not a positive finite number."""
    weights = np.nan_to_num(np.asarray(attention, dtype=np.float64), nan=0.0, posinf=0.0)
    return np.clip(weights, 0.0, None)
