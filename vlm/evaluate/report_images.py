"""Frames and attention maps as data URIs for the report page, within a budget of bytes.

Not here: which frames are shown (the caller) and how the page lays one over the other.
"""

import base64
import io

import numpy as np
from PIL import Image

#: what may be tried for a frame, best first: longest side in pixels, JPEG quality
_LADDER = ((160, 85), (160, 70), (160, 50), (128, 50), (96, 40), (64, 30))
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


def frame_uri(frame: np.ndarray, max_bytes: int) -> str:
    """A JPEG thumbnail of a (H, W, 3) uint8 frame; the smallest on offer may exceed the limit."""
    assert frame.ndim == 3 and frame.shape[2] == 3 and frame.dtype == np.uint8, frame.shape
    image = Image.fromarray(frame)
    data = b""
    for side, quality in _LADDER:
        small = image.copy()
        small.thumbnail((side, side))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=quality, optimize=True)
        data = buffer.getvalue()
        if len(data) <= max_bytes:
            break
    return _uri("jpeg", data)


def heat_uri(attention: np.ndarray) -> str:
    """One pixel per cell of a (gh, gw) map: a PNG to be stretched over the frame, hard-edged."""
    weights = clean_attention(attention)
    share = weights / (weights.max() or 1.0)
    steps = np.linspace(0, 1, len(_HEAT))
    rgba = np.stack([np.interp(share, steps, channel) for channel in _HEAT.T], axis=-1)
    buffer = io.BytesIO()
    Image.fromarray(rgba.round().astype(np.uint8)).save(buffer, "PNG", optimize=True)
    return _uri("png", buffer.getvalue())


def peak(attention: np.ndarray) -> float:
    """How many times its even share the strongest cell gets: 1 is uniform, 0 means no attention."""
    weights = clean_attention(attention)
    return float(weights.max() / weights.mean()) if weights.any() else 0.0


def clean_attention(attention: np.ndarray) -> np.ndarray:
    """As float64, with zero for what is not a positive finite number."""
    weights = np.nan_to_num(np.asarray(attention, dtype=np.float64), nan=0.0, posinf=0.0)
    return np.clip(weights, 0.0, None)


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
