"""Attention maps as images for the report page.

Not here: their colours (``vlm.train.look_pictures``), the frames below them (``vlm.page``) and how
the page lays one over the other.
"""

import io

import numpy as np
from PIL import Image

from vlm.page import data_uri
from vlm.train.look_pictures import clean_attention, heat_colours


def heat_uri(attention: np.ndarray) -> str:
    """One pixel per cell of a (gh, gw) map: a PNG to be stretched over the frame, hard-edged."""
    buffer = io.BytesIO()
    Image.fromarray(heat_colours(attention)).save(buffer, "PNG", optimize=True)
    return data_uri("png", buffer.getvalue())


def peak(attention: np.ndarray) -> float:
    """How many times its even share the strongest cell gets: 1 is uniform, 0 means no attention."""
    weights = clean_attention(attention)
    return float(weights.max() / weights.mean()) if weights.any() else 0.0
