import io

import numpy as np
import pytest
from PIL import Image

from vlm.data.format import frames
from vlm.data.format.frames import resize_crop
from vlm.data.format.image import load_image
from vlm.errors import SampleError


def encoded(picture: Image.Image, kind: str, **options: object) -> io.BytesIO:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    file.seek(0)
    return file


def smooth(height: int, width: int) -> np.ndarray:
    """(H, W, 3): a gradient, which every codec keeps."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * y / height, 255 * x / width, 128 + 0 * x], -1).astype(np.uint8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("shape", [(40, 60), (600, 400)])
def test_the_geometry_of_video_frames(kind: str, shape: tuple[int, int]) -> None:
    picture = smooth(*shape)
    found = load_image(encoded(Image.fromarray(picture), kind, quality=98), 32)
    expected = resize_crop(picture, 32)
    assert found.shape == (32, 32, 3) and found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 6


def test_what_is_transparent_becomes_white() -> None:
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[:, 8:] = (200, 0, 0, 255)
    found = load_image(encoded(Image.fromarray(rgba), "PNG"), 16)
    assert (found[:, :8] == 255).all()
    assert (found[:, 8:] == (200, 0, 0)).all()


def test_a_turned_camera() -> None:
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    found = load_image(encoded(Image.fromarray(picture), "PNG", exif=exif), 16)
    assert np.array_equal(found, np.rot90(picture, -1))


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "LA"])
def test_other_modes(mode: str) -> None:
    gray = np.repeat(np.linspace(0, 255, 16, dtype=np.uint8)[None], 16, 0)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    picture = Image.fromarray(gray).convert("RGB").convert(mode)
    found = load_image(encoded(picture, kind), 16)
    expected = np.asarray(picture.convert("RGB"))
    assert np.abs(found.astype(int) - expected).max() <= 6


def test_sixteen_bits_of_gray() -> None:
    gray = np.full((16, 16), 40000, np.uint16)
    found = load_image(encoded(Image.fromarray(gray), "PNG"), 16)
    assert (found == round(40000 / 257)).all()


def test_the_first_frame_of_an_animation() -> None:
    first, second = (Image.new("RGB", (16, 16), color) for color in ("blue", "red"))
    found = load_image(encoded(first, "GIF", save_all=True, append_images=[second]), 16)
    assert (found == (0, 0, 255)).all()


def test_what_is_no_image() -> None:
    whole = encoded(Image.fromarray(smooth(64, 64)), "PNG").getvalue()
    for data in (b"", b"hello" * 100, whole[: len(whole) // 2], b"%!PS-Adobe-3.0 EPSF"):
        with pytest.raises(SampleError, match="cannot be decoded"):
            load_image(io.BytesIO(data), 16)


def test_pixels_are_bounded_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    file = encoded(Image.fromarray(smooth(64, 64)), "PNG")
    monkeypatch.setattr(frames, "MAX_PIXELS", 1000)
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(SampleError, match="64x64 pixels"):
        load_image(file, 16)
