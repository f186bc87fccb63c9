"""A published image file to one frame: any common format, turned upright, resized and cropped.

The geometry is that of video frames (`vlm.data.format.frames`). Files come from anybody: formats
and pixels are bounded before any pixel is decoded. Not here: images of shards, which training
decodes (`vlm.data.format.decode`).
"""

import struct
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from vlm.data.format.frames import check_pixels, resize_crop
from vlm.errors import SampleError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
#: what Pillow raises on bytes of anybody
_DAMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)


def load_image(file: BinaryIO, size: int) -> np.ndarray:
    """The image as a square frame; the first one of an animation.

    Returns:
        (size, size, 3) uint8, RGB; what is transparent has become white.

    Raises:
        SampleError: no image, damaged, or too many pixels; the message does not name the sample.
    """
    try:
        with Image.open(file, formats=FORMATS) as picture:
            check_pixels(*picture.size)
            # JPEG can leave out what scaling would throw away: large photos decode much faster
            picture.draft("RGB", (2 * size, 2 * size))
            return resize_crop(np.array(_to_rgb(ImageOps.exif_transpose(picture))), size)
    except _DAMAGE as error:
        raise SampleError(f"cannot be decoded: {error}") from None


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        # 16 bits of gray, which Pillow would clip
        gray = np.rint(np.asarray(picture) / 257).clip(0, 255)
        return Image.fromarray(gray.astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        whole = picture.convert("RGBA")
        white = Image.new("RGBA", whole.size, "white")
        return Image.alpha_composite(white, whole).convert("RGB")
    return picture.convert("RGB")
