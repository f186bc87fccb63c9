"""By hand, pixel by pixel."""

import numpy as np
import pytest

from vlm.config import AugmentConfig
from vlm.data.load.augment import augment


def clip(seed: int = 0, num_frames: int = 3, height: int = 6, width: int = 8) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def draw(frames: np.ndarray, seed: int, **options: float) -> np.ndarray:
    config = AugmentConfig.model_validate(options)
    return augment(frames, config, np.random.default_rng(seed))


def shifted(frames: np.ndarray, down: int, right: int) -> np.ndarray:
    _, height, width, _ = frames.shape
    out = np.empty_like(frames)
    for y in range(height):
        for x in range(width):
            from_y = min(max(y - down, 0), height - 1)
            from_x = min(max(x - right, 0), width - 1)
            out[:, y, x] = frames[:, from_y, from_x]
    return out


def test_nothing_happens_unless_asked_for() -> None:
    frames = clip()
    assert np.array_equal(draw(frames, 1), frames)


def test_the_same_draw_gives_the_same_frames_and_another_one_others() -> None:
    options = {"shift_px": 2, "contrast": 0.1, "brightness": 0.05}
    one, same, other = (draw(clip(), seed, **options) for seed in (3, 3, 4))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_a_clip_is_shifted_as_a_whole_by_every_step_up_to_the_bound() -> None:
    frames = clip()
    steps = [(down, right) for down in range(-2, 3) for right in range(-2, 3)]
    expected = {shifted(frames, *step).tobytes(): step for step in steps}
    found = {expected[draw(frames, seed, shift_px=2).tobytes()] for seed in range(300)}
    assert found == set(steps)


def test_contrast_and_brightness_move_every_pixel_alike_and_stay_in_range() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3).repeat(2, 0)
    for seed in range(50):
        out = draw(ramp, seed, contrast=0.5, brightness=0.4)
        assert out.dtype == np.uint8 and np.array_equal(out[0], out[1])
        values = out[0, :, :, 0].ravel().astype(int)
        steps = np.diff(values)
        assert (steps >= 0).all(), "a brighter pixel stays brighter: nothing wraps around"
        inside = (values > 0) & (values < 255)
        slope = np.polyfit(np.arange(256)[inside], values[inside], 1)[0]
        assert 0.49 < slope < 1.51


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [({"contrast": 0.2}, (80, 100), (100, 120)), ({"brightness": 0.2}, (49, 100), (100, 151))],
)
def test_draws_reach_both_ends(
    options: dict[str, float], low: tuple[int, int], high: tuple[int, int]
) -> None:
    grey = np.full((1, 2, 2, 3), 100, np.uint8)
    values = [int(draw(grey, seed, **options)[0, 0, 0, 0]) for seed in range(300)]
    assert low[0] - 1 <= min(values) < low[0] + 4
    assert high[1] - 4 < max(values) <= high[1]


def test_the_input_stays_as_it_is() -> None:
    frames = clip()
    before = frames.copy()
    draw(frames, 1, shift_px=3, contrast=0.3, brightness=0.3)
    assert np.array_equal(frames, before)


def test_a_shift_beyond_the_frame_leaves_its_border() -> None:
    frames = clip(height=2, width=2)
    for seed in range(20):
        assert draw(frames, seed, shift_px=9).shape == frames.shape
