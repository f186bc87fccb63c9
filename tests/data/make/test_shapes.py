"""Every answer again, from the pixels: where the foreground is, where it goes, what colour."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from vlm import config
from vlm.config import AugmentConfig
from vlm.data.load.augment import augment
from vlm.data.make import shapes
from vlm.data.make.shapes import COLOURS, DIRECTIONS, HEIGHT, SHAPES, WIDTH, Clip, Shape

NUM_CLIPS = 120
RECIPE = Path(__file__).parents[3] / "recipes" / "quickstart.yaml"


def make(index: int, **options: float) -> tuple[Clip, np.ndarray, list[tuple[str, str, str]]]:
    """A clip, its frames (T, H, W, 3), and (question, answer, task) of every turn."""
    rng = np.random.default_rng([1, index])
    clip = shapes.make_clip(rng, **options)  # type: ignore[arg-type]
    frames = np.stack(list(shapes.render(clip, rng)))
    turns = shapes.conversation(clip, rng)
    pairs = [
        (asked["content"], told["content"], told.get("task", "caption"))
        for asked, told in zip(turns[::2], turns[1::2], strict=True)
    ]
    return clip, frames, pairs


def distances(frames: np.ndarray, clip: Clip) -> dict[str, np.ndarray]:
    """How far each pixel is from the colour of each thing in the picture: (T, H, W) each."""
    known = {"background": clip.background} | {s.colour: COLOURS[s.colour] for s in clip.shapes}
    return {
        name: np.linalg.norm(frames.astype(float) - np.array(colour, float), axis=-1)
        for name, colour in known.items()
    }


def centre(frame: np.ndarray, clip: Clip, shape: Shape) -> tuple[float, float]:
    """(x, y) of the middle of all pixels that look like the shape's colour."""
    found = distances(frame[None], clip)
    others = np.min([d for name, d in found.items() if name != shape.colour], axis=0)
    rows, columns = np.nonzero(found[shape.colour][0] < others[0])
    return float(columns.mean() + 0.5), float(rows.mean() + 0.5)


def quarter(x: float, y: float) -> str:
    return f"{'top' if y < HEIGHT / 2 else 'bottom'} {'left' if x < WIDTH / 2 else 'right'}"


def subject(question: str, clip: Clip) -> Shape:
    """The one shape that a question is about."""
    words = set(re.findall(r"\w+", question))
    named = [s for s in clip.shapes if {s.shape, s.colour} & words]
    found = named or list(clip.shapes)
    assert len(found) == 1, (question, clip)
    return found[0]


def seen(question: str, task: str, frames: np.ndarray, clip: Clip) -> str:
    """The answer by pixels alone; of a shape only what the clip says."""
    shape = subject(question, clip)
    first, last = centre(frames[0], clip, shape), centre(frames[-1], clip, shape)
    if task == "position":
        return quarter(*(first if "start" in question else last))
    if task == "direction":
        moved = np.subtract(last, first)
        return max(DIRECTIONS, key=lambda way: float(np.dot(DIRECTIONS[way], moved)))
    if task == "colour":
        far = distances(frames, clip)["background"]
        inside = frames[far > 0.8 * far.max()].astype(float).mean(0)
        return min(COLOURS, key=lambda name: float(np.linalg.norm(inside - COLOURS[name])))
    assert task == "shape", task
    return shape.shape


def test_every_answer_is_what_the_pixels_show() -> None:
    asked: set[tuple[str, str]] = set()
    for index in range(NUM_CLIPS):
        clip, frames, pairs = make(index, two_frac=0.0)
        for question, answer, task in pairs:
            if task == "caption":
                assert clip.shapes[0].colour in answer and clip.shapes[0].shape in answer
                continue
            assert answer == seen(question, task, frames, clip), (index, question)
            asked.add((task, answer))
    answers = {task: {a for t, a in asked if t == task} for task, _ in asked}
    assert answers["direction"] == set(DIRECTIONS)
    assert answers["colour"] == set(COLOURS)
    assert answers["shape"] == set(SHAPES)
    assert len(answers["position"]) == 4


def test_of_two_shapes_the_question_names_one() -> None:
    tasks = set()
    for index in range(NUM_CLIPS):
        clip, frames, pairs = make(index, two_frac=1.0)
        one, other = clip.shapes
        assert one.colour != other.colour and one.shape != other.shape
        for question, answer, task in pairs:
            if task == "caption":
                continue
            tasks.add(task)
            if task in ("position", "direction"):
                assert answer == seen(question, task, frames, clip), (index, question)
            else:
                assert answer == vars(subject(question, clip))[task]
    assert tasks == {"position", "direction", "colour", "shape"}


def test_a_clip_of_one_second_stands_still_and_asks_of_no_movement() -> None:
    clips = [make(index) for index in range(NUM_CLIPS)]
    short = [(frames, pairs) for clip, frames, pairs in clips if clip.duration_s == 1]
    assert len(short) > 10
    for frames, pairs in short:
        assert abs(frames.astype(int) - frames[0]).max() < 30, "noise alone"
        assert not any("start" in question or task == "direction" for question, _, task in pairs)


def test_no_turn_gives_another_one_away() -> None:
    """The clip is one conversation in training; a question must not hold another's answer."""
    for index, two_frac in itertools.product(range(NUM_CLIPS), (0.0, 1.0)):
        _, _, pairs = make(index, two_frac=two_frac)
        for (question, _, _), (_, answer, task) in itertools.permutations(pairs, 2):
            if task != "caption":
                assert not re.search(rf"\b{answer}\b", question), (question, answer)
        questions = [question for question, _, _ in pairs]
        assert len(set(questions)) == len(questions)


def test_two_shapes_never_hide_each_other() -> None:
    for index in range(40):
        clip, frames, _ = make(index, two_frac=1.0)
        for frame in frames:
            for shape in clip.shapes:
                found = distances(frame[None], clip)
                own = found[shape.colour][0] == np.min(list(found.values()), axis=0)[0]
                assert own.sum() > 15, (index, shape)


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(SHAPES, 2)))
def test_shapes_do_not_look_alike(one: str, other: str) -> None:
    def mask(name: str) -> np.ndarray:
        shape = Shape("white", name, "left", 6.5, (20.0, 16.0), 10.0)
        clip = Clip(1, (shape,), (0, 0, 0), "shape")
        (frame, *_) = shapes.render(clip, np.random.default_rng(0))
        return frame[..., 0] > 120

    a, b = mask(one), mask(other)
    assert (a & b).sum() / (a | b).sum() < 0.75


def test_augmentation_leaves_every_place_true() -> None:
    """Shifted as far as the quickstart shifts, no shape crosses a middle line."""
    options = config.load(RECIPE).data.augment
    assert 0 < options.shift_px < shapes.CLEARANCE
    shift = AugmentConfig(shift_px=options.shift_px)
    for index in range(60):
        clip, frames, pairs = make(index, two_frac=0.0)
        for draw in range(4):
            moved = augment(frames, shift, np.random.default_rng(draw))
            for question, answer, task in pairs:
                if task in ("position", "direction"):
                    assert answer == seen(question, task, moved, clip), (index, draw, question)


def test_a_seed_is_a_clip() -> None:
    (clip, frames, pairs), (same, again, asked), (other, _, _) = make(3), make(3), make(4)
    assert clip == same and pairs == asked and np.array_equal(frames, again)
    assert clip != other


def test_clips_last_from_one_second_to_the_longest() -> None:
    durations = [shapes.make_clip(np.random.default_rng(i), 16).duration_s for i in range(600)]
    assert set(durations) == set(range(1, 17))
    clip, frames, _ = make(5)
    assert frames.shape == (clip.duration_s * shapes.FPS, HEIGHT, WIDTH, 3)
    assert frames.dtype == np.uint8


def test_text_answers_are_right() -> None:
    opposites = {"left": "right", "up": "down", "top": "bottom"}
    opposites |= {b: a for a, b in opposites.items()}
    kinds = set()
    for index in range(200):
        turns = shapes.text_conversation(np.random.default_rng(index))
        assert [t["role"] for t in turns] == ["user", "assistant"] * (len(turns) // 2)
        for asked, told in zip(turns[::2], turns[1::2], strict=True):
            question, answer = asked["content"], told["content"]
            assert told["task"] == "text"
            if numbers := re.findall(r"\d+", question):
                assert answer == str(sum(map(int, numbers)))
            elif match := re.search(r"opposite of (\w+)", question):
                assert answer == opposites[match[1]]
            elif match := re.search(r"Is (\w+) a colour", question):
                assert answer == ("yes" if match[1] in COLOURS else "no")
            else:
                assert answer == ("three" if "triangle" in question else "four")
            kinds.add(question.split()[0] + question.split()[2])
    assert len(kinds) >= 4
