"""Sizes of JPEGs against what simplejpeg's decoder says of the same files."""

import io
import random
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from vlm.data.format.jpeg import plain_shape, plain_shapes


def encoded(mode: str = "RGB", **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(256, size=(24, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True, "optimize": True},
        {"comment": "x" * 700, "subsampling": 0},
        {"restart_marker_blocks": 2},
        {"icc_profile": bytes(70_000)},
        {"exif": exif(1)},
        {"keep_rgb": True},
    ],
)
def test_it_agrees_with_the_decoder(mode: str, options: dict[str, Any]) -> None:
    jpeg = encoded(mode, **options)
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(jpeg)
    assert colorspace in ("Gray", "RGB", "YCbCr")
    assert plain_shape(jpeg) == plain_shape(memoryview(jpeg)) == (height, width) == (24, 40)
    padded = jpeg[:2] + b"\xff" * 5 + jpeg[2:]
    assert simplejpeg.decode_jpeg_header(padded)[:2] == plain_shape(padded)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_photos_that_are_turned_are_not_plain(orientation: int) -> None:
    assert plain_shape(encoded(exif=exif(orientation))) is None


def test_exif_that_nobody_can_read_is_not_plain() -> None:
    jpeg = encoded(exif=exif(1))
    at = jpeg.index(b"Exif\0\0") + 6
    assert plain_shape(jpeg[:at] + b"nonsense" + jpeg[at + 8 :]) in (None, (24, 40))
    assert plain_shape(jpeg[: at + 8]) is None


def test_others_are_not_plain() -> None:
    assert plain_shape(encoded("CMYK")) is None
    jpeg = encoded()
    start_of_frame = jpeg.index(b"\xff\xc0")
    for body in (b"", b"\xff\xd8", jpeg[: start_of_frame + 6], bytes(500), b"\x89PNG" * 20):
        assert plain_shape(body) is None
    arithmetic = bytearray(jpeg)
    arithmetic[start_of_frame + 1] = 0xC9
    assert plain_shape(bytes(arithmetic)) is None


def test_several_are_read_as_one_by_one() -> None:
    bodies = [
        encoded(),
        encoded(quality=30),
        encoded(),
        encoded(),
        encoded("CMYK"),
        encoded("L"),
        b"",
        encoded(exif=exif(1)),
        encoded(exif=exif(6)),
        encoded(exif=exif(1)),
        encoded()[:170],
        encoded(),
    ]
    shapes = plain_shapes(memoryview(body) for body in bodies)
    assert shapes == [plain_shape(body) for body in bodies]
    assert shapes.count(None) == 3 + (plain_shape(bodies[10]) is None)


def test_damaged_heads_end() -> None:
    """Whatever the bytes, an answer comes, and where both give one it is the decoder's."""
    rng, jpeg = random.Random(0), encoded()
    for _ in range(500):
        damaged = bytearray(jpeg)
        for _ in range(3):
            damaged[rng.randrange(200)] = rng.randrange(256)
        found = plain_shape(bytes(damaged))
        try:
            expected = simplejpeg.decode_jpeg_header(bytes(damaged))
        except ValueError:
            continue
        assert found is None or found == expected[:2]
