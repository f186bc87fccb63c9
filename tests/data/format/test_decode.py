"""Decoded frames against Pillow's own decoding and scaling, written out here."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from tests.data import helpers
from tests.data.clips import indices, write_clip
from vlm.data.format import decode, frames, jpeg
from vlm.data.format.decode import DEFAULT_SAMPLING, Sampling, decode_frames, measure
from vlm.data.format.layout import Content
from vlm.errors import DataError, SampleError


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> memoryview:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return memoryview(file.getvalue())


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    """Smooth, so that JPEG keeps it."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 255 / height, columns * 255 / width, rows * 0 + 90], axis=2)
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def images(*bodies: memoryview, suffix: str = "jpg") -> Content:
    named = {f"a.{i:03d}.{suffix}": body for i, body in enumerate(bodies)}
    return Content(helpers.make_sample(0, len(bodies)), named, {})


def video(path: Path) -> Content:
    sample = helpers.make_sample(0, 1).model_copy(update={"frame_count": None})
    return Content(sample, {}, {f"a{path.suffix}": memoryview(path.read_bytes())})


def run(
    content: Content, shape: tuple[int, int, int], sampling: Sampling = DEFAULT_SAMPLING
) -> np.ndarray:
    out = np.full((*shape, 3), 7, np.uint8)
    decode_frames(content, out, sampling, "here")
    return out


def by_pillow(body: memoryview, size: int) -> np.ndarray:
    """The centre square, scaled at once."""
    whole = Image.open(io.BytesIO(body)).convert("RGB")
    side = min(whole.size)
    left, top = (whole.width - side) / 2, (whole.height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(whole.resize((size, size), Image.Resampling.BICUBIC, box=box))


def test_images_of_the_wanted_size_are_decoded_as_they_are() -> None:
    bodies = [encoded(picture(16, 24)), encoded(picture(16, 24, "L"))]
    found = run(images(*bodies), (2, 16, 24))
    expected = [np.asarray(Image.open(io.BytesIO(b)).convert("RGB")) for b in bodies]
    assert np.array_equal(found, np.stack(expected))
    assert measure(images(*bodies), None, DEFAULT_SAMPLING, "here") == (2, 16, 24)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_photos_are_turned_whatever_their_size(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    body = encoded(picture(16, 16), exif=exif, quality=95)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(body)))
    found = run(images(body), (1, 16, 16))[0]
    assert np.abs(found.astype(int) - np.asarray(upright.convert("RGB"))).max() <= 3
    lies = np.asarray(Image.open(io.BytesIO(body)).convert("RGB"))
    assert (np.abs(found.astype(int) - lies).max() <= 3) == (orientation == 1)


def test_a_photo_that_is_turned_needs_a_size() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    body = encoded(picture(16, 24), exif=exif)
    with pytest.raises(SampleError, match="build the manifest with --size"):
        measure(images(body), None, DEFAULT_SAMPLING, "here")
    assert measure(images(body), 16, DEFAULT_SAMPLING, "here") == (1, 16, 16)


def test_they_go_straight_into_the_memory_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("Pillow is not asked")

    monkeypatch.setattr(decode, "load_image", refuse)
    slab = np.zeros((3, 16, 16, 3), np.uint8)
    decode_frames(images(encoded(picture(16, 16))), slab[1:2], DEFAULT_SAMPLING, "here")
    assert slab[1].any()
    assert not slab[0].any() and not slab[2].any()


@pytest.mark.parametrize(
    ("kind", "suffix", "mode"),
    [
        ("JPEG", "jpg", "RGB"),
        ("JPEG", "jpeg", "L"),
        ("JPEG", "jpg", "CMYK"),
        ("PNG", "png", "RGB"),
        ("PNG", "png", "P"),
        ("PNG", "png", "L"),
        ("WEBP", "webp", "RGB"),
    ],
)
@pytest.mark.parametrize("size", [(40, 60), (60, 40), (24, 24)])
def test_others_are_scaled_and_cropped(
    kind: str, suffix: str, mode: str, size: tuple[int, int]
) -> None:
    body = encoded(picture(*size, mode), kind)
    content = images(body, suffix=suffix)
    assert measure(content, 24, DEFAULT_SAMPLING, "here") == (1, 24, 24)
    found = run(content, (1, 24, 24))
    assert np.abs(found[0].astype(int) - by_pillow(body, 24)).max() <= 1


def test_a_header_that_the_decoder_reads_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jpeg, "_read_head", lambda _: ((16, 16), 0))
    with pytest.raises(SampleError, match="here, member a.000.jpg: a damaged JPEG: two headers"):
        run(images(encoded(picture(8, 16))), (1, 16, 16))


def test_what_is_transparent_becomes_white() -> None:
    clear = picture(8, 8, "RGBA")
    clear.putalpha(0)
    assert (run(images(encoded(clear, "PNG"), suffix="png"), (1, 8, 8)) == 255).all()


def test_sizes_that_differ_need_one_to_be_brought_to() -> None:
    content = images(encoded(picture(16, 24)), encoded(picture(24, 16)))
    with pytest.raises(SampleError, match=r"here: frames of several sizes.*--size"):
        measure(content, None, DEFAULT_SAMPLING, "here")
    assert measure(content, 8, DEFAULT_SAMPLING, "here") == (2, 8, 8)
    assert run(content, (2, 8, 8)).shape == (2, 8, 8, 3)
    with pytest.raises(SampleError, match=r"a.001.jpg: 24 x 16 pixels where 16 x 24 are wanted"):
        run(content, (2, 16, 24))
    flat = images(encoded(picture(16, 24), "PNG"), suffix="png")
    with pytest.raises(SampleError, match=r"a.000.png.*--size"):
        measure(flat, None, DEFAULT_SAMPLING, "here")


def test_text_has_no_frames() -> None:
    content = Content(helpers.make_sample(0, 0), {}, {})
    assert measure(content, None, DEFAULT_SAMPLING, "here") == (0, 0, 0)
    assert run(content, (0, 0, 0)).shape == (0, 0, 0, 3)


@pytest.mark.parametrize("suffix", ["mp4", "webm", "mkv", "avi", "mov"])
def test_videos(tmp_path: Path, suffix: str) -> None:
    codec = {"avi": "mpeg4", "webm": "libvpx"}.get(suffix, "libx264")
    content = video(write_clip(tmp_path / f"a.{suffix}", 40, width=64, height=64, codec=codec))
    shape = measure(content, 32, DEFAULT_SAMPLING, "here")
    assert shape == (5, 32, 32)
    assert indices(list(run(content, shape))) == [0, 8, 16, 24, 32]
    faster = Sampling(fps=2.0, max_frames=4)
    assert measure(content, 32, faster, "here") == (4, 32, 32)
    assert indices(list(run(content, (4, 32, 32), faster))) == [0, 10, 20, 30]


def test_a_video_needs_a_size_and_its_number_of_frames(tmp_path: Path) -> None:
    content = video(write_clip(tmp_path / "a.mp4", 16))
    with pytest.raises(DataError, match=r"a.mp4: a video file has no size.*--size") as caught:
        measure(content, None, DEFAULT_SAMPLING, "here")
    assert not isinstance(caught.value, SampleError), "every video would be left out in silence"
    for shape, fault in (((3, 32, 32), "2 frames, but .* says 3"), ((2, 16, 32), "16 x 32 are wa")):
        with pytest.raises(SampleError, match=fault):
            run(content, shape)
    with pytest.raises(SampleError, match="1 frames, but the manifest says 2"):
        run(images(encoded(picture(8, 8))), (2, 8, 8))


@pytest.mark.parametrize(
    ("name", "body", "fault"),
    [
        ("a.jpg", encoded(picture(8, 8), "PNG"), "not a JPEG"),
        ("a.png", encoded(picture(8, 8)), "not a PNG or WebP"),
        ("a.png", encoded(picture(8, 8), "GIF"), "not a PNG or WebP"),
        ("a.webp", memoryview(b"RIFF....WEBP"), "not a PNG or WebP"),
        ("a.jpg", memoryview(b""), "not a JPEG"),
        ("a.jpg", encoded(picture(64, 64))[:-40], "a damaged JPEG"),
        ("a.png", encoded(picture(64, 64), "PNG")[:-40], "cannot be decoded"),
        ("a.mp4", memoryview(b"ftyp" * 50), "cannot be decoded"),
    ],
)
def test_damage_is_named(name: str, body: memoryview, fault: str) -> None:
    is_video = name.endswith("mp4")
    content = Content(
        helpers.make_sample(0, 1),
        {} if is_video else {name: body},
        {name: body} if is_video else {},
    )
    with pytest.raises(SampleError, match=f"^here, member {name}: .*{fault}"):
        run(content, (1, 64, 64))


@pytest.mark.parametrize(("kind", "suffix"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_pixels_are_counted_before_they_are_decoded(
    monkeypatch: pytest.MonkeyPatch, kind: str, suffix: str
) -> None:
    monkeypatch.setattr(frames, "MAX_PIXELS", 100)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", None)
    monkeypatch.setattr(decode, "load_image", None)
    content = images(encoded(picture(8, 24), kind), suffix=suffix)
    for call in (
        lambda: measure(content, 8, DEFAULT_SAMPLING, "x"),
        lambda: run(content, (1, 8, 8)),
    ):
        with pytest.raises(SampleError, match=f"a.000.{suffix}: .*24x8 pixels, at most 100"):
            call()
