"""From encoded images or a video file to frames of the size that a model sees.

An image that has this size already, as all have that precompute made, is decoded straight into the
caller's memory; others are scaled and cropped as precompute does it. All bytes are hostile: pixels
are counted before any is decoded. Not here: whose members these are (`vlm.data.format.layout`).
"""

import io
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from vlm.data.format import jpeg
from vlm.data.format.frames import check_pixels, count_frames, extract_frames
from vlm.data.format.image import load_image
from vlm.data.format.layout import Content
from vlm.data.format.schema import MAX_FRAMES
from vlm.errors import DataError, SampleError

_JPEG = (".jpg", ".jpeg")
_NOT_PLAIN = "an image that is no RGB or gray JPEG"


class Sampling(NamedTuple):
    """Which frames of a video file are taken, see ``frames.sample_times``."""

    fps: float = 1.0
    max_frames: int = MAX_FRAMES


DEFAULT_SAMPLING = Sampling()


class Shape(NamedTuple):
    """Of the frames that a model sees."""

    num_frames: int
    height: int
    width: int


def measure(content: Content, size: int | None, sampling: Sampling, where: str) -> Shape:
    """What ``decode_frames`` will fill, from headers alone; all 0 for text.

    Args:
        size: Side of the square that frames are brought to; None leaves them as they are.

    Raises:
        SampleError: no image or video, too many pixels, or several sizes and no ``size``.
        DataError: a video file and no ``size``.
    """
    for name, video in content.video.items():
        if size is None:
            raise DataError(
                f"{where}, member {name}: a video file has no size of its own here; give the size "
                "that frames are brought to (build_manifest --size)"
            )
        try:
            num_frames = count_frames(
                io.BytesIO(video), fps=sampling.fps, max_frames=sampling.max_frames
            )
        except SampleError as error:
            raise SampleError(f"{where}, member {name}: {error}") from None
        return Shape(num_frames, size, size)
    shapes = set()
    for name, image in content.images.items():
        member = f"{where}, member {name}"
        shape = image_shape(name, image, member)
        shapes.add(shape if size is None else (size, size))
        if size is None and not is_plain(name, image, shape):
            _check_square(shape, _NOT_PLAIN, member)
    if len(shapes) > 1:
        raise SampleError(
            f"{where}: frames of several sizes {sorted(shapes)}; expected one, or a size to bring "
            "them to (build_manifest --size)"
        )
    return Shape(len(content.images), *(shapes.pop() if shapes else (0, 0)))


def decode_frames(content: Content, out: np.ndarray, sampling: Sampling, where: str) -> None:
    """Decodes all frames of a sample.

    Args:
        out: (T, H, W, 3) uint8, filled with RGB.

    Raises:
        SampleError: not T frames, a damaged image or video, one that cannot be brought to H x W.
    """
    if not content.video:
        _check_count(len(content.images), len(out), where)
        # all heads first: decoding leaves nothing of what this takes in the processor's caches
        wanted = out.shape[1:3]
        shapes = jpeg.plain_shapes(content.images.values())
        todo = list(zip(content.images, content.images.values(), out, shapes, strict=True))
        for name, image, frame, shape in todo:
            if shape == wanted and name.endswith(_JPEG):
                _decode_plain(image, frame, f"{where}, member {name}")
            else:
                _decode_scaled(name, image, frame, f"{where}, member {name}")
        return
    ((name, video),) = content.video.items()
    member = f"{where}, member {name}"
    _check_square(out.shape[1:3], "a video file", member)
    try:
        frames = extract_frames(
            io.BytesIO(video),
            size=out.shape[1],
            fps=sampling.fps,
            max_frames=sampling.max_frames,
        )
    except SampleError as error:
        raise SampleError(f"{member}: {error}") from None
    _check_count(len(frames), len(out), member)
    np.stack(frames, out=out)


def image_shape(name: str, image: memoryview | bytes, where: str) -> tuple[int, int]:
    """(height, width) from the header of an image, by its member's name.

    Raises:
        SampleError: not the image its name says, or one so large that decoding it would be an
            attack.
    """
    try:
        if name.endswith(_JPEG):
            height, width, _, _ = simplejpeg.decode_jpeg_header(image)
        else:
            with Image.open(io.BytesIO(image), formats=("PNG", "WEBP")) as picture:
                width, height = picture.size
        check_pixels(width, height)
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        kind = "JPEG" if name.endswith(_JPEG) else "PNG or WebP"
        raise SampleError(f"{where}: not a {kind}: {error}") from None
    except SampleError as error:
        raise SampleError(f"{where}: {error}") from None
    return height, width


def is_plain(name: str, image: memoryview | bytes, shape: tuple[int, ...]) -> bool:
    """Whether an image is decoded as it lies, in this (height, width); all others are scaled."""
    return name.endswith(_JPEG) and jpeg.plain_shape(image) == shape


def decode_image(name: str, image: memoryview | bytes, out: np.ndarray, where: str) -> None:
    """Decodes one image, scaled and cropped if it has another size.

    Args:
        name: Its member's name, which says what it is.
        out: (H, W, 3) uint8, filled with RGB.

    Raises:
        SampleError: what ``image_shape`` refuses, a damaged image, or H x W that is not square
            where the image must be scaled to it.
    """
    if is_plain(name, image, out.shape[:2]):
        _decode_plain(image, out, where)
    else:
        _decode_scaled(name, image, out, where)


def _decode_plain(image: memoryview | bytes, out: np.ndarray, where: str) -> None:
    try:
        # strict: a damaged file is an error, not a grey area at the bottom of the picture
        found = simplejpeg.decode_jpeg(image, colorspace="RGB", strict=True, buffer=out)
    except ValueError as error:
        raise SampleError(f"{where}: a damaged JPEG: {error}") from None
    if found.shape != out.shape:
        raise SampleError(f"{where}: a damaged JPEG: two headers, of different sizes")


def _decode_scaled(name: str, image: memoryview | bytes, out: np.ndarray, where: str) -> None:
    height, width = image_shape(name, image, where)
    own = (height, width) == out.shape[:2]
    _check_square(out.shape[:2], _NOT_PLAIN if own else f"{height} x {width} pixels", where)
    try:
        out[...] = load_image(io.BytesIO(image), out.shape[0])
    except SampleError as error:
        raise SampleError(f"{where}: {error}") from None


def _check_count(found: int, expected: int, where: str) -> None:
    if found != expected:
        raise SampleError(
            f"{where}: {found} frames, but the manifest says {expected}; the shard has changed, "
            "build the manifest again"
        )


def _check_square(size: tuple[int, ...], found: str, where: str) -> None:
    if size[0] != size[1]:
        raise SampleError(
            f"{where}: {found} where {size[0]} x {size[1]} are wanted; images are scaled to "
            "squares only, build the manifest with --size"
        )
