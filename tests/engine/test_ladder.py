"""Pieces of micro-batches against the samples that they are made of."""

import dataclasses

import torch

from tests.engine import engines
from tests.models import tiny
from vlm.batch import Batch
from vlm.engine import ladder

SHAPES = [(2, 5), (0, 7), (1, 3), (0, 4), (3, 6)]


def samples() -> list[Batch]:
    return [tiny.make_batch([shape], seed=index) for index, shape in enumerate(SHAPES)]


def same(one: Batch, other: Batch) -> None:
    """Frames that nobody owns may be any."""
    for name, value in vars(one).items():
        found = vars(other)[name]
        if isinstance(value, torch.Tensor):
            assert name == "frames" and not one.has_frames or torch.equal(value, found), name
        elif name != "keys":
            assert name == "kind" or value == found, name


def test_a_part_is_what_its_samples_make() -> None:
    alone = samples()
    whole = engines.join(alone)
    for first in range(len(SHAPES)):
        for last in range(first + 1, len(SHAPES) + 1):
            same(ladder.part(whole, first, last), engines.join(alone[first:last]))
            assert ladder.part(whole, first, last).keys == whole.keys[first:last]


def test_latents_stay_with_their_frames() -> None:
    whole = engines.join(samples())
    marks = torch.arange(float(len(whole.frames)))
    whole = dataclasses.replace(whole, latents=marks[:, None, None, None])
    marked = {
        frame.numpy().tobytes(): float(mark)
        for frame, mark in zip(whole.frames, marks, strict=True)
    }
    for first in range(len(SHAPES)):
        for last in range(first + 1, len(SHAPES) + 1):
            piece = ladder.part(whole, first, last)
            assert piece.latents is not None
            found = [marked[frame.numpy().tobytes()] for frame in piece.frames]
            assert piece.latents.flatten().tolist() == found


def test_every_micro_batch_has_as_many_pieces_and_nothing_is_lost_or_twice() -> None:
    model = engines.make_model().double().eval()
    batches = [engines.join(samples()), tiny.make_batch([(2, 5)], seed=9)]
    with torch.no_grad():
        expected = sum(float(model(batch).loss_sum) for batch in batches)
        for rung, num in ((0, 1), (1, 2), (2, 4), (3, 8), (4, 8)):
            pieces = ladder.cut(batches, rung)
            assert len(pieces) == num * len(batches)
            found = sum(float(model(piece).loss_sum) for piece in pieces)
            assert abs(found - expected) < 1e-5 * expected
            assert sum(p.num_loss_tokens for p in pieces) == sum(b.num_loss_tokens for b in batches)


def test_a_stand_in_is_short_and_teaches_nothing() -> None:
    one = ladder.stand_in(engines.join(samples()))
    assert one.num_samples == 1 and one.num_loss_tokens == 0
    assert len(one.input_ids) == min(count + text for count, text in SHAPES)
    loss = engines.make_model()(one).loss_sum
    loss.backward()
    assert float(loss) == 0
