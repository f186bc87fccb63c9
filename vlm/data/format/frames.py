"""Frames of a video: which ones, decoded in one pass, resized and cropped.

The same functions prepare training data and whatever a model is shown later, so that both see the
same pixels. Videos come from anybody: formats, pixels and duration are bounded. Not here: JPEG and
shards (`vlm.data.format.shards`).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from PIL import Image

from vlm.data.format.schema import MAX_FRAMES
from vlm.errors import SampleError

MAX_PIXELS = 64_000_000
MAX_DURATION_S = 4 * 3600.0
#: demuxers that only read the file they are given; playlists and the like open others
FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,gif,ogg,asf"
#: rounding of timestamps: Matroska keeps milliseconds
_TIME_SLACK_S = 0.002
#: a clip this much short of its last whole interval still owns it: many end one frame early
_INTERVAL_SLACK = 0.1


def sample_times(duration_s: float, fps: float, max_frames: int) -> list[float]:
    """When frames are taken, in seconds from the first frame.

    ``0, 1/fps, 2/fps, ...`` as long as the clip fills the whole interval that follows, but for a
    tenth of it: at 1 fps 8.0 s and 7.9 s give 8 frames, 7.8 s gives 7, and anything below 1.9 s
    gives 1. Where that makes more than ``max_frames``, ``max_frames`` are spread evenly over the
    whole clip.
    """
    count = max(1, int(duration_s * fps + _INTERVAL_SLACK))
    if count <= max_frames:
        return [k / fps for k in range(count)]
    return [k * duration_s / max_frames for k in range(max_frames)]


def extract_frames(
    video: Path | BinaryIO, *, size: int, fps: float = 1.0, max_frames: int = MAX_FRAMES
) -> list[np.ndarray]:
    """The frames at ``sample_times``: of each time the first frame at or after it.

    Args:
        video: A file, or its bytes as a seekable file object.
        size: Side of the square frames.

    Returns:
        1 to ``max_frames`` arrays (size, size, 3) uint8, RGB.

    Raises:
        SampleError: not a video, damaged, without frames, or beyond the bounds; the message does
            not name the sample.
    """
    if isinstance(video, Path):
        with video.open("rb") as file:
            return extract_frames(file, size=size, fps=fps, max_frames=max_frames)
    with _open(video) as (container, stream):
        duration_s = _declared_duration(container, stream)
        times = sample_times(duration_s, fps, max_frames)
        frames, found_s = _decode(container, stream, times, size)
    # The header may be silent or wrong about the duration. What was decoded is right.
    right = sample_times(found_s, fps, max_frames)
    if len(right) != len(times) or abs(right[-1] - times[-1]) > 0.5 * found_s / max_frames:
        video.seek(0)
        with _open(video) as (container, stream):
            frames, _ = _decode(container, stream, right, size)
    return frames


def count_frames(video: BinaryIO, *, fps: float = 1.0, max_frames: int = MAX_FRAMES) -> int:
    """How many frames ``extract_frames`` gives of a video, without decoding it.

    Raises:
        SampleError: not a video, without frames, or beyond the bounds.
    """
    with _open(video) as (container, stream):
        interval_s = _interval(stream)
        first_s, last_s, num_packets = math.inf, -math.inf, 0
        for packet in container.demux(stream):
            if not packet.size or packet.is_discard:
                continue
            stamp = packet.dts if packet.pts is None else packet.pts
            time_s = num_packets * interval_s if stamp is None else float(stamp * packet.time_base)
            first_s, last_s = min(first_s, time_s), max(last_s, time_s)
            if last_s - first_s > MAX_DURATION_S:
                raise SampleError(f"longer than {MAX_DURATION_S:.0f} s")
            num_packets += 1
    if not num_packets:
        raise SampleError("no frames")
    return len(sample_times(last_s - first_s + interval_s, fps, max_frames))


def resize_crop(frame: np.ndarray, size: int) -> np.ndarray:
    """Scales the short side to ``size`` and takes the centre.

    Args:
        frame: (H, W, 3) uint8.

    Returns:
        (size, size, 3) uint8.
    """
    height, width, _ = frame.shape
    if height == width == size:
        return frame
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    image = Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.asarray(image)


@contextmanager
def _open(video: BinaryIO) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first video stream, within bounds; FFmpeg's errors become ours."""
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
    try:
        with av.open(video, options=options) as container:
            if not container.streams.video:
                raise SampleError("no video stream")
            stream = container.streams.video[0]
            codec = stream.codec_context
            check_pixels(codec.width, codec.height)
            codec.options = {"max_pixels": str(MAX_PIXELS)}
            # clips are spread over processes; threads for each one only cost
            codec.thread_count = 1
            yield container, stream
    except (av.FFmpegError, UnicodeDecodeError) as error:
        raise SampleError(f"cannot be decoded: {error}") from None


def _decode(
    container: InputContainer, stream: VideoStream, times: list[float], size: int
) -> tuple[list[np.ndarray], float]:
    """One pass over the stream: the frames at ``times``, and how long it really is."""
    interval_s = _interval(stream)
    converter = VideoReformatter()
    frames: list[np.ndarray] = []
    start_s = elapsed_s = 0.0
    last: VideoFrame | None = None
    for index, frame in enumerate(container.decode(stream)):
        time_s = index * interval_s if frame.time is None else frame.time
        if last is None:
            start_s = time_s
        elapsed_s = max(elapsed_s, time_s - start_s)
        if elapsed_s > MAX_DURATION_S:
            raise SampleError(f"longer than {MAX_DURATION_S:.0f} s")
        picked: np.ndarray | None = None
        while len(frames) < len(times) and elapsed_s >= times[len(frames)] - _TIME_SLACK_S:
            picked = _to_array(frame, size, converter) if picked is None else picked
            frames.append(picked)
        last = frame
    if last is None:
        raise SampleError("no frames")
    if len(frames) < len(times):
        tail = _to_array(last, size, converter)
        frames += [tail] * (len(times) - len(frames))
    return frames, elapsed_s + interval_s


def _to_array(frame: VideoFrame, size: int, converter: VideoReformatter) -> np.ndarray:
    if frame.is_corrupt:
        raise SampleError(f"damaged at {frame.time} s")
    check_pixels(frame.width, frame.height)
    # one thread: starting the default pool costs more than a small frame's conversion
    rgb = converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    # what the camera was turned by, counter-clockwise
    turned = np.rot90(rgb, round(frame.rotation / 90))
    return resize_crop(np.ascontiguousarray(turned), size)


def _interval(stream: VideoStream) -> float:
    """Seconds from one frame to the next, on average."""
    return float(1 / stream.average_rate) if stream.average_rate else 0.0


def _declared_duration(container: InputContainer, stream: VideoStream) -> float:
    if stream.duration is not None and stream.time_base is not None:
        duration_s = float(stream.duration * stream.time_base)
    elif container.duration is not None:
        duration_s = container.duration / av.time_base
    else:
        return 0.0
    if duration_s > MAX_DURATION_S:
        raise SampleError(f"{duration_s:.0f} s long, at most {MAX_DURATION_S:.0f} s are read")
    return max(0.0, duration_s)


def check_pixels(width: int, height: int) -> None:
    """SampleError if decoding so many would be an attack."""
    if width * height > MAX_PIXELS:
        raise SampleError(f"{width}x{height} pixels, at most {MAX_PIXELS} are read")
