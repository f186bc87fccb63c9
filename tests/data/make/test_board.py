"""Every answer again, from the pixels of the field that the question names."""

import re

import numpy as np

from vlm.data.make import board, shapes
from vlm.data.make.shapes import COLOURS, Clip


def named_field(frame: np.ndarray, question: str) -> np.ndarray:
    """(16, 16, 3) of the field that a question names, from 1 in the order of reading."""
    found = re.fullmatch(r"What colour is field ([1-9])\?", question)
    assert found, question
    row, column = divmod(int(found[1]) - 1, 3)
    return frame[16 * row : 16 * (row + 1), 16 * column : 16 * (column + 1)]


def foreground(cells: np.ndarray, clip: Clip) -> np.ndarray:
    """True at pixels that are not the background's."""
    return np.abs(cells.astype(float) - np.array(clip.background)).max(-1) > 100


def colour_of(cell: np.ndarray, clip: Clip) -> str:
    found = np.median(cell[foreground(cell, clip)].astype(float), axis=0)
    return min(COLOURS, key=lambda name: float(np.abs(found - COLOURS[name]).sum()))


def test_the_named_field_holds_the_answer_in_every_frame() -> None:
    for index in range(150):
        rng = np.random.default_rng([3, index])
        clip = board.make_clip(rng)
        frames = np.stack(list(shapes.render(clip, rng)))
        assert frames.shape == (clip.duration_s * shapes.FPS, 48, 48, 3)
        asked, told = board.conversation(clip, rng)
        assert told["task"] == "colour"
        for frame in frames:
            assert told["content"] == colour_of(named_field(frame, asked["content"]), clip)
        cells = foreground(frames[0], clip).reshape(3, 16, 3, 16).any((1, 3))
        assert cells.sum() == len(clip.shapes), "each in a field of its own"
        low, high = map(int, re.findall(r"\d", board.group(clip)))
        assert low <= len(clip.shapes) <= high == low + 2


def test_a_question_tells_nothing_of_its_answer() -> None:
    """Whoever does not look is right once in six."""
    rng = np.random.default_rng(0)
    answers: dict[str, list[str]] = {}
    for _ in range(3000):
        asked, told = board.conversation(board.make_clip(rng), rng)
        answers.setdefault(asked["content"], []).append(told["content"])
    assert len(answers) == 9
    for given in answers.values():
        assert len(given) > 200
        assert max(map(given.count, COLOURS)) / len(given) < 0.27
