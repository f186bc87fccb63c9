"""From encoded images or a video file to frames of the size that a model sees.

An image that has this size already, as all have that precompute made, is decoded straight into the
caller's memory; others are scaled and cropped as precompute does it. All bytes are hostile: pixels
are counted before any is decoded. Not here: whose members these are (`vlm.data.format.layout`).
"""

import io
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import ExifTags, Image

from vlm.data.format.frames import check_pixels, count_frames, extract_frames
from vlm.data.format.image import load_image
from vlm.data.format.layout import Content
from vlm.data.format.schema import MAX_FRAMES
from vlm.errors import DataError, SampleError


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
        shape, is_plain_jpeg = _header(name, image, member)
        shapes.add(shape if size is None else (size, size))
        if size is None and not is_plain_jpeg:
            _check_square(shape, "an image that is no RGB or gray JPEG", member)
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
        for frame, (name, image) in zip(out, content.images.items(), strict=True):
            decode_image(name, image, frame, f"{where}, member {name}")
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
    return _header(name, image, where)[0]


def decode_image(name: str, image: memoryview | bytes, out: np.ndarray, where: str) -> None:
    """Decodes one image, scaled and cropped if it has another size.

    Args:
        name: Its member's name, which says what it is.
        out: (H, W, 3) uint8, filled with RGB.

    Raises:
        SampleError: what ``image_shape`` refuses, a damaged image, or H x W that is not square
            where the image must be scaled to it.
    """
    shape, is_plain_jpeg = _header(name, image, where)
    if not is_plain_jpeg or shape != out.shape[:2]:
        _check_square(out.shape[:2], f"{shape[0]} x {shape[1]} pixels", where)
        try:
            out[...] = load_image(io.BytesIO(image), out.shape[0])
        except SampleError as error:
            raise SampleError(f"{where}: {error}") from None
        return
    try:
        # strict: a damaged file is an error, not a grey area at the bottom of the picture
        simplejpeg.decode_jpeg(image, colorspace="RGB", strict=True, buffer=out)
    except ValueError as error:
        raise SampleError(f"{where}: a damaged JPEG: {error}") from None


def _header(name: str, image: memoryview | bytes, where: str) -> tuple[tuple[int, int], bool]:
    """(height, width), and whether simplejpeg can make RGB of it as it lies; pixels are bounded."""
    is_plain_jpeg = False
    try:
        if name.endswith((".jpg", ".jpeg")):
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(image)
            check_pixels(width, height)
            is_plain_jpeg = colorspace in ("Gray", "RGB", "YCbCr") and not _is_turned(image)
        else:
            with Image.open(io.BytesIO(image), formats=("PNG", "WEBP")) as picture:
                width, height = picture.size
            check_pixels(width, height)
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        kind = "JPEG" if name.endswith((".jpg", ".jpeg")) else "PNG or WebP"
        raise SampleError(f"{where}: not a {kind}: {error}") from None
    except SampleError as error:
        raise SampleError(f"{where}: {error}") from None
    return (height, width), is_plain_jpeg


def _is_turned(jpeg: memoryview | bytes) -> bool:
    """Whether EXIF says that a JPEG is shown otherwise than its pixels lie. Ours have none."""
    start = 2  # behind the marker that begins every JPEG
    # segments APP0 to APP15, which stand before its tables
    while start + 10 <= len(jpeg) and jpeg[start] == 0xFF and jpeg[start + 1] >> 4 == 0xE:
        if bytes(jpeg[start + 4 : start + 10]) == b"Exif\0\0":
            with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as picture:
                return picture.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1)
        start += 2 + (jpeg[start + 2] << 8 | jpeg[start + 3])
    return False


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
