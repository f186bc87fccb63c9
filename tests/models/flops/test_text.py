"""Passes of the language model; ``test_counters.py`` holds whole models to torch's counter."""

from tests.models import tiny
from vlm.models.flops.layers import Flops
from vlm.models.flops.shapes import needed, shapes_of
from vlm.models.flops.text import TextFlops

WORK = needed(shapes_of(tiny.make_batch([(3, 6)])))


def test_a_frozen_language_model_passes_gradients_on_and_takes_none() -> None:
    language = tiny.make_model().language
    trains, passes, rests = Flops(), Flops(), Flops()
    TextFlops(language).read(trains, WORK.full, False)
    language.requires_grad_(False)
    frozen = TextFlops(language)
    assert frozen.read(passes, WORK.full, True)
    assert not frozen.read(rests, WORK.full, False)
    assert trains.forward == passes.forward == rests.forward
    assert trains.backward > passes.backward > rests.backward == 0
