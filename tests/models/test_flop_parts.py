"""Parts by hand; whole models are held to torch's own counter in ``test_flops.py``."""

from tests.models import tiny
from vlm.models.flop_blocks import Flops
from vlm.models.flop_parts import PatchFlops, TextFlops
from vlm.models.flop_work import needed, shapes_of
from vlm.models.vision import VisionEncoder

WORK = needed(shapes_of(tiny.make_batch([(3, 6)])))


def test_a_tower_that_is_read_to_its_end_costs_more_backward_than_one_for_queries() -> None:
    patches = PatchFlops(VisionEncoder(tiny.make_tower()))
    assert patches.frame_tokens(WORK) == (5, 4)
    whole, queried = Flops(), Flops()
    assert patches.run(whole, WORK, False, for_queries=False)
    assert patches.run(queried, WORK, False, for_queries=True)
    assert whole.forward == queried.forward
    # of the last layer: attention, its output, the MLP, and queries
    assert whole.backward > queried.backward
    lean = Flops()
    patches.run(lean, WORK, True, for_queries=False)
    stem = 2 * 3 * 4 * 3 * 8 * 8 * tiny.VISION["hidden_size"]
    assert lean.recompute == whole.forward - stem


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
