"""The size of a JPEG that can be decoded as it lies, from the first segments of the file.

A tenth of the time that a decoder takes to set itself up for the same answer. Not here: decoding,
and whether the rest of the file is sound (`vlm.data.format.decode`).
"""

import io
import struct
from collections.abc import Iterable

from PIL import ExifTags, Image

#: marker and length of a segment; height, width and number of components of a frame header
_SEGMENT = struct.Struct(">BBH")
_FRAME = struct.Struct(">HHB")
#: frame headers of baseline, extended and progressive files
_FRAMES = {0xC0, 0xC1, 0xC2}
#: what may stand before it: tables, comments and what applications add
_SKIPPED = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}
_EXIF = 0xE1


def plain_shape(jpeg: memoryview | bytes) -> tuple[int, int] | None:
    """(height, width) of a gray, RGB or YCbCr JPEG whose pixels lie as they are shown.

    None for all else: CMYK, photos that EXIF turns, what is no JPEG.
    """
    return _read_head(jpeg)[0]


def plain_shapes(jpegs: Iterable[memoryview | bytes]) -> list[tuple[int, int] | None]:
    """``plain_shape`` of each; those of a clip mostly begin alike, and one of them is looked at."""
    found, head, shape = [], b"", None
    for jpeg in jpegs:
        if not head or bytes(jpeg[: len(head)]) != head:
            shape, length = _read_head(jpeg)
            head = bytes(jpeg[:length])
        found.append(shape)
    return found


def _read_head(jpeg: memoryview | bytes) -> tuple[tuple[int, int] | None, int]:
    """``plain_shape``, and how many bytes tell it; 0 where it needs more than the first ones."""
    position = 2  # behind the marker that begins every JPEG
    has_exif = False
    try:
        while True:
            begin, marker, length = _SEGMENT.unpack_from(jpeg, position)
            if marker in _FRAMES and begin == 0xFF:
                height, width, num_components = _FRAME.unpack_from(jpeg, position + 5)
                end = 0 if has_exif else position + 5 + _FRAME.size
                return (height, width) if num_components in (1, 3) else None, end
            if begin != 0xFF or (marker == _EXIF and _is_turned(jpeg, position)):
                return None, 0
            has_exif = has_exif or marker == _EXIF
            if marker in _SKIPPED:
                position += 2 + length
            elif marker == 0xFF:  # padding
                position += 1
            else:
                return None, 0
    except struct.error:  # the file ends here
        return None, 0


def _is_turned(jpeg: memoryview | bytes, position: int) -> bool:
    """Whether the application segment at ``position`` is EXIF that turns the photo."""
    if bytes(jpeg[position + 4 : position + 10]) != b"Exif\0\0":
        return False
    try:
        with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as picture:
            return picture.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1)
    except (ValueError, OSError, SyntaxError, struct.error, Image.DecompressionBombError):
        return True  # whoever decodes it the long way names the fault
