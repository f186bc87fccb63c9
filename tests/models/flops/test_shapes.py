"""Shapes of batches, and what padding adds to them."""

from tests.models import tiny
from vlm.models.flops.shapes import Shapes, executed, needed, shapes_of


def test_shapes_of_a_batch() -> None:
    shapes = shapes_of(tiny.make_batch([(3, 9), (0, 5), (2, 6)], before=4))
    assert shapes.lengths == (12, 5, 8)
    assert shapes.prefixes == (7, 0, 6)
    assert (shapes.frames, shapes.frame_size) == ((3, 0, 2), (tiny.SIZE, tiny.SIZE))
    text = shapes_of(tiny.make_batch([(0, 7), (0, 12)]))
    assert text.num_frames == 0 and text.prefixes == (0, 0)


def test_padding_is_executed_and_not_needed() -> None:
    shapes = Shapes((12, 5, 8), (7, 0, 6), (3, 0, 2), 9, (16, 16))
    rows, flat, real = executed(shapes, False), executed(shapes, True), needed(shapes)
    assert (rows.full.tokens, rows.full.pairs) == (36, 3 * 12**2)
    assert (rows.prefix.tokens, flat.prefix.tokens, real.prefix.tokens) == (21, 7 + 5 + 7, 13)
    assert flat.full == real.full == (25, 12**2 + 5**2 + 8**2)
    # one token after another up to the last frame, and the rest at once
    assert real.stepped.pairs == (28 + 5 * 12) + 5 * 5 + (21 + 2 * 8)
    # what stands beside the text: three frames for every row, or each sample's own
    assert rows.context == (9, 9 * 12) and real.context == (5, 3 * 12 + 2 * 8)
    # a blank frame stands in where there is none
    text = Shapes((7, 12), (0, 0), (0, 0), 9, (16, 16))
    assert (executed(text, False).num_frames, needed(text).num_frames) == (1, 0)
