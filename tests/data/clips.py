"""Small videos whose frames say which they are: frame i shows the bits of i as eight blocks."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def pattern(index: int, height: int, width: int) -> np.ndarray:
    """(H, W, 3): two rows of four blocks, white where the bit is set."""
    bits = [(index >> bit) & 1 for bit in range(8)]
    blocks = np.array(bits, np.uint8).reshape(2, 4) * 255
    return np.kron(blocks, np.ones((height // 2, width // 4), np.uint8))[..., None].repeat(3, 2)


def write_clip(
    path: Path,
    num_frames: int,
    fps: int | Fraction = 8,
    width: int = 32,
    height: int = 32,
    times: list[float] | None = None,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
) -> Path:
    """Writes ``num_frames`` patterns; ``times`` gives each its timestamp in seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(pattern(i, height, width), "rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[i] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def indices(frames: list[np.ndarray]) -> list[int]:
    """Which frames these are; each is square."""
    return [_index(frame) for frame in frames]


def _index(frame: np.ndarray) -> int:
    size = len(frame)
    blocks = frame[..., 1].reshape(2, size // 2, 4, size // 4).mean((1, 3)) > 128
    return sum(1 << bit for bit, on in enumerate(blocks.ravel()) if on)
