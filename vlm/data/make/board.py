"""A still board of nine fields, of which some hold shapes, and a question that names a field.

The world of ``vlm.data.make.shapes`` for models that choose where to look: the colours of so many
shapes, drawn independently, are more than one small token holds, and the question stands before
the frames. Boards of few shapes are there to learn from.
"""

import numpy as np

from vlm.data.make.shapes import COLOURS, SHAPES, Clip, Shape

SIDE = 3  # fields, which are numbered from 1 in the order of reading
CELL = 16  # px
JITTER = 1.0  # px that a centre may be off the middle of its field
DURATION_S = 2


def make_clip(rng: np.random.Generator) -> Clip:
    """Draws one clip, in which nothing moves: one to nine shapes, each in a field of its own."""
    # boards of few shapes, from which colours are learned first, are common: even on a log scale
    count = int(np.exp(rng.uniform(0, np.log(SIDE**2 + 1))))
    fields = rng.permutation(SIDE**2)[:count]
    background = tuple(int(v) for v in rng.integers(0, 30, 3))
    return Clip(
        duration_s=DURATION_S,
        shapes=tuple(_make_shape(rng, int(index)) for index in fields),
        background=background,  # type: ignore[arg-type]
        named_by="field",
        size=(SIDE * CELL, SIDE * CELL),
    )


def _make_shape(rng: np.random.Generator, index: int) -> Shape:
    row, column = divmod(index, SIDE)
    x, y = (CELL * (i + 0.5) + float(rng.uniform(-JITTER, JITTER)) for i in (column, row))
    colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
    return Shape(colour, shape, "right", float(rng.uniform(5, 6)), (x, y), 0.0)


def field(shape: Shape) -> int:
    """The number of the field that a shape is in."""
    column, row = (int(v / CELL) for v in shape.start)
    return SIDE * row + column + 1


def conversation(clip: Clip, rng: np.random.Generator) -> list[dict[str, str]]:
    """One question about one of the shapes, and its answer."""
    shape = clip.shapes[int(rng.integers(len(clip.shapes)))]
    return [
        {"role": "user", "content": f"What colour is field {field(shape)}?"},
        {"role": "assistant", "content": shape.colour, "task": "colour"},
    ]


def group(clip: Clip) -> str:
    """What a clip counts for beside its question's task."""
    first = 3 * ((len(clip.shapes) - 1) // 3) + 1
    return f"{first} to {first + 2} shapes"
