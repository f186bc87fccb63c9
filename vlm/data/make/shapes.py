"""A small world whose truth is known: coloured shapes that move, and questions about them.

Everything follows from one seed per clip. A question can only be answered by looking: colours,
shapes, directions and places are drawn independently, and in a clip of two shapes the question
names one of them. Turns of one clip never give each other away, so a clip's objects are named
either always by shape or always by colour.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 50),
    "purple": (160, 60, 200),
    "white": (240, 240, 240),
}
SHAPES = ("square", "ring", "bar", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

HEIGHT, WIDTH = 32, 40  # px; the centre crop to a square loses nothing that a question needs
FPS = 2
MAX_QUESTIONS = 5  # of a clip
CLEARANCE = 2.5  # px that both ends of a path keep from the middle lines: room for augmentation


@dataclass(frozen=True)
class Shape:
    colour: str
    shape: str
    direction: str
    radius: float  # px
    start: tuple[float, float]  # x, y of the centre, px
    path: float  # px travelled over the clip

    def centre(self, progress: float) -> tuple[float, float]:
        """Where the centre is after a share of the clip."""
        dx, dy = DIRECTIONS[self.direction]
        x, y = self.start
        return x + dx * self.path * progress, y + dy * self.path * progress


@dataclass(frozen=True)
class Clip:
    duration_s: int
    shapes: tuple[Shape, ...]
    background: tuple[int, int, int]
    named_by: str  # "shape", "colour" or "field": how questions tell shapes apart
    size: tuple[int, int] = (HEIGHT, WIDTH)  # px


def make_clip(rng: np.random.Generator, max_seconds: int = 16, two_frac: float = 0.1) -> Clip:
    """Draws one clip."""
    # short clips are as common as long ones on a log scale
    duration_s = int(np.exp(rng.uniform(0, np.log(max_seconds + 1))))
    count = 2 if rng.random() < two_frac else 1
    colours = rng.permutation(list(COLOURS))[:count]
    shapes = rng.permutation(SHAPES)[:count]
    ways = rng.choice(list(DIRECTIONS), count)
    while True:
        drawn = tuple(
            _make_shape(rng, *map(str, traits))
            for traits in zip(colours, shapes, ways, strict=True)
        )
        if count == 1 or _apart(*drawn):
            break
    background = tuple(int(v) for v in rng.integers(0, 30, 3))
    named_by = str(rng.choice(["shape", "colour"]))
    return Clip(duration_s, drawn, background, named_by)  # type: ignore[arg-type]


def _make_shape(rng: np.random.Generator, colour: str, shape: str, direction: str) -> Shape:
    """A path of 10 to 15 px inside the central square, both ends clear of the middle lines."""
    radius = float(rng.uniform(5.5, 7.5))
    dx, dy = DIRECTIONS[direction]
    low, high = radius - 1, HEIGHT - radius + 1
    while True:
        path = float(rng.uniform(10, 15))
        x, y = rng.uniform(low, high, 2)
        end_x, end_y = x + dx * path, y + dy * path
        inside = low <= end_x <= high and low <= end_y <= high
        clear = min(abs(v - HEIGHT / 2) for v in (x, y, end_x, end_y))
        if inside and clear > CLEARANCE:
            return Shape(colour, shape, direction, radius, (x + (WIDTH - HEIGHT) / 2, y), path)


def _apart(first: Shape, second: Shape) -> bool:
    """True if the two never hide each other."""
    for progress in np.linspace(0, 1, 9):
        (ax, ay), (bx, by) = first.centre(progress), second.centre(progress)
        if np.hypot(ax - bx, ay - by) < first.radius + second.radius:
            return False
    return True


def render(clip: Clip, rng: np.random.Generator, fps: int = FPS) -> Iterator[np.ndarray]:
    """Yields duration x fps frames of (H, W, 3) uint8, ``clip.size`` large."""
    num_frames = clip.duration_s * fps
    last = num_frames - fps  # the last whole second shows the end of the path
    for index in range(num_frames):
        frame = np.empty((*clip.size, 3), np.float32)
        frame[:] = clip.background
        progress = min(1.0, index / last) if last else 1.0
        for shape in clip.shapes:
            cover = _coverage(shape, shape.centre(progress), clip.size)[..., None]
            frame = frame * (1 - cover) + np.array(COLOURS[shape.colour], np.float32) * cover
        frame += rng.normal(0, 2, (*clip.size, 1))
        yield frame.clip(0, 255).astype(np.uint8)


def _coverage(shape: Shape, centre: tuple[float, float], size: tuple[int, int]) -> np.ndarray:
    """(H, W) share of each pixel inside the shape, by its signed distance."""
    rows, columns = np.ogrid[0 : size[0], 0 : size[1]]
    dx = columns.astype(np.float32) + np.float32(0.5) - np.float32(centre[0])
    dy = rows.astype(np.float32) + np.float32(0.5) - np.float32(centre[1])
    r = np.float32(shape.radius)
    if shape.shape == "square":
        distance = np.maximum(abs(dx), abs(dy)) - 0.88 * r
    elif shape.shape == "ring":
        distance = abs(np.hypot(dx, dy) - 0.75 * r) - 0.25 * r
    elif shape.shape == "bar":
        distance = np.maximum(abs(dx) - 1.1 * r, abs(dy) - 0.35 * r)
    else:
        distance = np.maximum(dy - 0.75 * r, 0.866 * abs(dx) - 0.5 * dy - 0.62 * r)
    return (0.5 - distance).clip(0, 1)


def conversation(clip: Clip, rng: np.random.Generator) -> list[dict[str, str]]:
    """Questions and answers about a clip in random order, and last, sometimes, a caption.

    A caption gives answers away, so nothing comes after it; it has no task and is not judged.
    """
    pairs = [pair for shape in clip.shapes for pair in _questions(clip, shape)]
    turns = []
    for question, answer, task in (pairs[i] for i in rng.permutation(len(pairs))[:MAX_QUESTIONS]):
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": answer, "task": task})
    if rng.random() < 0.3:
        turns.append({"role": "user", "content": "Describe the video."})
        turns.append({"role": "assistant", "content": caption(clip)})
    return turns


def group(clip: Clip) -> str:
    """What a clip counts for beside its questions' tasks."""
    return "one shape" if len(clip.shapes) == 1 else "two shapes"


def _questions(clip: Clip, shape: Shape) -> list[tuple[str, str, str]]:
    """(question, answer, task) for one shape, by the name that the clip gives to its shapes."""
    if len(clip.shapes) == 1:
        name = "it"
    else:
        name = f"the {shape.shape}" if clip.named_by == "shape" else f"the {shape.colour} shape"
    pairs = [(f"Where is {name} at the end?", place(shape, 1.0), "position")]
    if len(clip.shapes) == 1 or clip.named_by == "shape":
        pairs.append((f"What colour is {name}?", shape.colour, "colour"))
    if len(clip.shapes) == 1 or clip.named_by == "colour":
        pairs.append((f"What shape is {name}?", shape.shape, "shape"))
    if clip.duration_s > 1:
        pairs.append((f"Where is {name} at the start?", place(shape, 0.0), "position"))
        pairs.append((f"Which way does {name} move?", shape.direction, "direction"))
    return pairs


def place(shape: Shape, progress: float) -> str:
    """The quarter of the picture in which the shape is after a share of the clip."""
    x, y = shape.centre(progress)
    return f"{'top' if y < HEIGHT / 2 else 'bottom'} {'left' if x < WIDTH / 2 else 'right'}"


def caption(clip: Clip) -> str:
    parts = []
    for shape in clip.shapes:
        text = f"a {shape.colour} {shape.shape}"
        parts.append(f"{text} moves {shape.direction}" if clip.duration_s > 1 else text)
    return " and ".join(parts)


def text_conversation(rng: np.random.Generator) -> list[dict[str, str]]:
    """Questions that need no video."""
    turns = []
    for _ in range(int(rng.integers(1, 4))):
        question, answer = _text_pair(rng)
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": answer, "task": "text"})
    return turns


def _text_pair(rng: np.random.Generator) -> tuple[str, str]:
    kind = int(rng.integers(4))
    if kind == 0:
        a, b = (int(v) for v in rng.integers(0, 10, 2))
        return f"What is {a} plus {b}?", str(a + b)
    if kind == 1:
        way, other = [("left", "right"), ("up", "down"), ("top", "bottom")][int(rng.integers(3))]
        swap = rng.random() < 0.5
        return f"What is the opposite of {other if swap else way}?", way if swap else other
    if kind == 2:
        words = ["ring", "red", "square", "green", "left", "up"]
        word = words[int(rng.integers(len(words)))]
        is_colour = word in COLOURS
        return f"Is {word} a colour?", "yes" if is_colour else "no"
    sides = {"triangle": "three", "square": "four"}
    shape = list(sides)[int(rng.integers(len(sides)))]
    return f"How many sides does a {shape} have?", sides[shape]
