"""Strips and animations, read back pixel by pixel."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from vlm.train import look_pictures
from vlm.train.look_pictures import GAP, LABEL_HEIGHT, LABEL_WIDTH, SIDE, Seen, write_pictures

GREY = np.full((32, 64, 3), 128, np.uint8)
WIDTH, HEIGHT = SIDE, SIDE // 2


def one_cell(row: int, column: int) -> np.ndarray:
    """(2, 4) with all attention in one cell."""
    found = np.zeros((2, 4))
    found[row, column] = 0.5
    return found


def panel(sheet: Image.Image, row: int, column: int) -> np.ndarray:
    x, y = LABEL_WIDTH + column * (WIDTH + GAP), LABEL_HEIGHT + row * (HEIGHT + GAP)
    return np.asarray(sheet)[y : y + HEIGHT, x : x + WIDTH].astype(int)


def cell(panel: np.ndarray, row: int, column: int) -> np.ndarray:
    return panel[32 * row + 16, 32 * column + 16]


def clip(num_frames: int) -> Seen:
    fine = [one_cell(1, t % 4) for t in range(num_frames)]
    return Seen(
        np.stack([GREY] * num_frames), np.stack([one_cell(0, 0)] * num_frames), np.stack(fine)
    )


def write(folder: Path, *clips: Seen) -> tuple[Image.Image, Image.Image]:
    """Those of the last clip."""
    write_pictures(folder, clips)
    kinds = ("gif", "png")
    names = [f"clip_{number:02d}.{kind}" for number in range(len(clips)) for kind in kinds]
    assert sorted(path.name for path in folder.iterdir()) == names
    gif, png = (Image.open(folder / name) for name in names[-2:])
    return png, gif


def test_a_strip_has_a_column_for_each_frame_and_a_row_for_each_pass(tmp_path: Path) -> None:
    strip, _ = write(tmp_path / "attention", clip(1), clip(3))
    for column in range(3):
        assert (panel(strip, 0, column) == 128).all(), "the frame itself"
        coarse, fine, change = (panel(strip, row, column) for row in (1, 2, 3))
        assert cell(coarse, 0, 0).sum() > 2 * cell(coarse, 1, column).sum()
        assert cell(fine, 1, column).sum() > 2 * cell(fine, 0, 0).sum()
        red, _, blue = cell(change, 1, column)
        assert red > 2 * blue, "looked at more"
        red, _, blue = cell(change, 0, 0)
        assert blue > 2 * red, "looked at less"
        assert (cell(change, 1, (column + 1) % 4) == 128).all(), "alike"


def test_an_animation_shows_every_frame(tmp_path: Path) -> None:
    strip, animation = write(tmp_path, clip(5))
    assert animation.n_frames == 5 and animation.info["duration"] == look_pictures.FRAME_MS  # type: ignore[attr-defined]
    assert animation.size == (4 * (WIDTH + GAP) - GAP, LABEL_HEIGHT + HEIGHT)
    for index in (0, 4):
        animation.seek(index)
        shown = np.asarray(animation.convert("RGB"))[LABEL_HEIGHT:].astype(int)
        for row in range(4):
            left = row * (WIDTH + GAP)
            # a GIF has 256 colours
            assert np.abs(shown[:, left : left + WIDTH] - panel(strip, row, index)).mean() < 6


def test_of_long_clips_some_are_shown_from_first_to_last(tmp_path: Path) -> None:
    strip, animation = write(tmp_path, clip(64))
    assert strip.width == LABEL_WIDTH + look_pictures.MAX_FRAMES * (WIDTH + GAP)
    # of frames that look alike a GIF keeps one, for longer
    durations = [frame.info["duration"] for frame in ImageSequence.Iterator(animation)]
    assert sum(durations) == look_pictures.MAX_FRAMES * look_pictures.FRAME_MS
    last = panel(strip, 2, look_pictures.MAX_FRAMES - 1)
    assert cell(last, 1, 3).sum() > 2 * cell(last, 1, 0).sum(), "frame 63 looks at the last column"


def test_a_coarse_pass_alone_has_two_panels_and_old_clips_go(tmp_path: Path) -> None:
    write(tmp_path, clip(2), clip(2), clip(2))
    strip, animation = write(tmp_path, clip(2)._replace(fine=None))
    assert strip.size == (LABEL_WIDTH + 2 * (WIDTH + GAP), LABEL_HEIGHT + 2 * (HEIGHT + GAP))
    assert animation.width == 2 * (WIDTH + GAP) - GAP
    coarse = panel(strip, 1, 1)
    assert cell(coarse, 0, 0).sum() > 2 * cell(coarse, 1, 1).sum()


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 0.0])
def test_odd_attention_draws_nothing_and_breaks_nothing(value: float) -> None:
    odd = np.full((2, 4), value)
    clear = look_pictures.change_colours(odd, odd)
    assert clear.shape == (2, 4, 4) and (clear[..., 3] == 0).all()
    frame, *_, change = look_pictures.panels(GREY, odd, odd)
    assert np.array_equal(np.asarray(frame), np.asarray(change))
