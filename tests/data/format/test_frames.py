import io
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.clips import indices, write_clip
from vlm.data.format import frames
from vlm.data.format.frames import count_frames, extract_frames, resize_crop, sample_times
from vlm.errors import SampleError


@pytest.mark.parametrize(
    ("duration_s", "count"),
    [(0, 1), (0.5, 1), (1.89, 1), (1.9, 2), (7.8, 7), (7.9, 8), (8.0, 8), (8.04, 8), (64, 64)],
)
def test_one_frame_a_second(duration_s: float, count: int) -> None:
    assert sample_times(duration_s, 1.0, 64) == list(range(count))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "mov", "webm"])
@pytest.mark.parametrize("rate", [8, Fraction(30000, 1001)])
def test_frames_are_counted_without_decoding(
    tmp_path: Path, suffix: str, rate: int | Fraction
) -> None:
    codec = {"avi": "mpeg4", "webm": "libvpx"}.get(suffix, "libx264")
    for num_frames in (1, 39):
        clip = write_clip(tmp_path / f"a.{suffix}", num_frames, fps=rate, codec=codec)
        for fps, most in ((1.0, 64), (2.0, 4), (0.5, 64)):
            with clip.open("rb") as file:
                counted = count_frames(file, fps=fps, max_frames=most)
            assert counted == len(extract_frames(clip, size=32, fps=fps, max_frames=most))


def test_frames_of_uneven_times_are_counted_too(tmp_path: Path) -> None:
    times = [0.0, 0.04, 0.5, 2.6, 2.7, 5.95]
    for suffix in ("mp4", "mkv"):
        clip = write_clip(tmp_path / f"a.{suffix}", len(times), times=times)
        with clip.open("rb") as file:
            assert count_frames(file) == len(extract_frames(clip, size=32))


def test_what_is_no_video_has_no_frames_to_count(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match="cannot be decoded"):
        count_frames(io.BytesIO(b"no video" * 99))


def test_long_clips_are_sampled_evenly_to_their_end() -> None:
    times = sample_times(640.0, 1.0, 64)
    assert times == [10.0 * k for k in range(64)]
    assert sample_times(10.0, 2.0, 4) == [0.0, 2.5, 5.0, 7.5]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
@pytest.mark.parametrize(("num_frames", "expected"), [(64, 8), (63, 7), (57, 7), (56, 7), (1, 1)])
def test_frames_at_whole_seconds(
    tmp_path: Path, suffix: str, num_frames: int, expected: int
) -> None:
    codec = "mpeg4" if suffix == "avi" else "libx264"
    clip = write_clip(tmp_path / f"a.{suffix}", num_frames, codec=codec)
    found = extract_frames(clip, size=32)
    assert indices(found) == [8 * k for k in range(expected)]
    assert all(f.shape == (32, 32, 3) and f.dtype == np.uint8 for f in found)


def test_at_or_after_the_time_with_uneven_timestamps(tmp_path: Path) -> None:
    times = [0.0, 0.9, 1.1, 1.9, 2.0, 2.5, 3.2, 4.0, 4.1]
    clip = write_clip(tmp_path / "a.mkv", len(times), times=times)
    # 4.1 s and one interval more make 4 whole seconds
    assert indices(extract_frames(clip, size=32)) == [0, 2, 4, 6]


def test_time_counts_from_the_first_frame(tmp_path: Path) -> None:
    times = [5.0 + i / 8 for i in range(24)]
    clip = write_clip(tmp_path / "a.mkv", 24, times=times)
    assert indices(extract_frames(clip, size=32)) == [0, 8, 16]


def test_ntsc_rates(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4", 96, fps=Fraction(24000, 1001))
    # frame 24 is shown at 1.001 s, frame 23 at 0.959 s
    assert indices(extract_frames(clip, size=32)) == [0, 24, 48, 72]


def test_more_seconds_than_frames(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4", 40)
    assert indices(extract_frames(clip, size=32, max_frames=4)) == [0, 10, 20, 30]
    assert len(extract_frames(clip, size=32, fps=4.0)) == 20


@pytest.mark.parametrize("declared_s", [0.0, 1.0, 5.0, 1000.0])
@pytest.mark.parametrize("max_frames", [4, 64])
def test_a_header_that_lies_about_the_duration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, declared_s: float, max_frames: int
) -> None:
    clip = write_clip(tmp_path / "a.mp4", 64)
    honest = extract_frames(clip, size=32, max_frames=max_frames)
    monkeypatch.setattr(frames, "_declared_duration", lambda *_: declared_s)
    lying = extract_frames(clip, size=32, max_frames=max_frames)
    assert indices(lying) == indices(honest)
    assert len(honest) == min(max_frames, 8)


def test_a_stream_without_a_duration(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mkv", 64, options={"live": "1"})
    assert indices(extract_frames(clip, size=32)) == [8 * k for k in range(8)]


def test_a_turned_camera(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4", 2)
    data = bytearray(clip.read_bytes())
    # the display matrix of tkhd: 90 degrees clockwise, so that top left becomes top right
    matrix = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30)
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = matrix
    straight = extract_frames(clip, size=32, fps=8.0)[1]
    turned = extract_frames(io.BytesIO(bytes(data)), size=32, fps=8.0)[1]
    assert straight[4, 4].min() > 200 > 50 > straight[4, 28].max()
    assert np.array_equal(turned, np.rot90(straight, -1))


@pytest.mark.parametrize("shape", [(20, 60), (60, 20), (20, 30)])
def test_resize_crop_is_scaling_and_then_cropping(shape: tuple[int, int]) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    height, width = (side * 12 // 20 for side in shape)
    scaled = Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - 12) // 2, (height - 12) // 2
    expected = np.asarray(scaled.crop((left, top, left + 12, top + 12))).astype(int)
    found = resize_crop(frame, 12)
    assert found.shape == (12, 12, 3)
    assert np.abs(found - expected).max() <= 2


def test_a_frame_of_the_right_size_is_left_alone() -> None:
    frame = np.zeros((12, 12, 3), np.uint8)
    assert resize_crop(frame, 12) is frame


def test_videos_of_any_shape_become_squares(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4", 8, width=64, height=36)
    assert extract_frames(clip, size=24)[0].shape == (24, 24, 3)


def test_what_is_not_a_video(tmp_path: Path) -> None:
    playlist = b"#EXTM3U\n#EXTINF:1,\n/etc/hostname\n"
    for data in (b"", b"hello" * 100, playlist):
        with pytest.raises(SampleError, match="cannot be decoded"):
            extract_frames(io.BytesIO(data), size=32)


def test_a_truncated_video(tmp_path: Path) -> None:
    noise = write_clip(tmp_path / "a.mp4", 64, options={"movflags": "faststart"})
    data = noise.read_bytes()
    for share in (0.3, 0.9):
        with pytest.raises(SampleError):
            extract_frames(io.BytesIO(data[: int(len(data) * share)]), size=32)


def test_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = write_clip(tmp_path / "a.mp4", 64)
    monkeypatch.setattr(frames, "MAX_DURATION_S", 5.0)
    with pytest.raises(SampleError, match="at most 5 s"):
        extract_frames(clip, size=32)
    monkeypatch.setattr(frames, "MAX_PIXELS", 1000)
    with pytest.raises(SampleError, match="32x32 pixels"):
        extract_frames(clip, size=32)
