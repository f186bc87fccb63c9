"""What HTML pages about data and runs share: templates, and texts and frames fit to be shown.

A page needs nothing but itself: its Content-Security-Policy forbids every request, and every
script but those whose hash it names. Names and texts come from shards, so templates escape all of
them. Not here: what a page shows.
"""

import base64
import hashlib
import io
import unicodedata
from collections.abc import Iterable

import jinja2
import numpy as np
from PIL import Image

#: a longer text from a shard or a model is cut here
MAX_TEXT = 500
#: what may be tried for a frame, best first: longest side in pixels, JPEG quality
_LADDER = ((160, 85), (160, 70), (160, 50), (128, 50), (96, 40), (64, 30))


def environment(package: str) -> jinja2.Environment:
    """Templates of ``package``'s folder ``templates``; a name they do not know is an error.

    They have the filters ``text``, which every value from outside goes through, and ``csp_hash``.
    """
    found = jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"text": clean_text, "csp_hash": csp_hash}
    return found


def clean_text(value: object) -> str:
    """A value from outside as text that can be shown: one line, no control characters, not
    endless."""
    text = str(value)
    cut = text[:MAX_TEXT] + "\N{HORIZONTAL ELLIPSIS}" if len(text) > MAX_TEXT else text
    return printable(" ".join(cut.split()))


def printable(text: str, keep: Iterable[str] = ()) -> str:
    """The text with what cannot be shown replaced, but for the characters to ``keep``."""
    # Cc: control characters. Cs: halves of a pair, which JSON may hold and UTF-8 may not.
    return "".join(
        "\N{REPLACEMENT CHARACTER}"
        if unicodedata.category(c) in ("Cc", "Cs") and c not in keep
        else c
        for c in text
    )


def csp_hash(script: str) -> str:
    """What a Content-Security-Policy calls an inline script or style by."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


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
    return data_uri("jpeg", data)


def data_uri(kind: str, data: bytes) -> str:
    """The bytes of an image as an address."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
