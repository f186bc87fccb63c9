"""The patch stream by hand; ``test_counters.py`` holds whole models to torch's counter."""

from tests.models import tiny
from vlm.models.flops.layers import Flops
from vlm.models.flops.looks import PatchFlops
from vlm.models.flops.shapes import needed, shapes_of
from vlm.models.vision import VisionEncoder

WORK = needed(shapes_of(tiny.make_batch([(3, 6)])))


def test_of_the_last_layer_only_keys_and_values_have_a_gradient() -> None:
    patches = PatchFlops(VisionEncoder(tiny.make_tower()))
    assert patches.frame_tokens(WORK) == (5, 4)
    plain, lean = Flops(), Flops()
    patches.run(plain, WORK, False)
    patches.run(lean, WORK, True)
    dim, tokens, frames = tiny.VISION["hidden_size"], 5, 3
    stem = 2 * frames * 4 * 3 * 8 * 8 * dim
    layer = 2 * frames * tokens * (4 + 2 * tiny.VISION["mlp_ratio"]) * dim**2
    attention = 4 * frames * tokens**2 * dim
    assert plain.forward == stem + tiny.VISION["num_hidden_layers"] * (layer + attention)
    # weights of the stem; twice a whole layer; twice two maps of the last
    last = 2 * 2 * frames * tokens * 2 * dim**2
    assert plain.backward == stem + 2 * (layer + attention) + last
    assert (lean.forward, lean.backward) == (plain.forward, plain.backward)
    assert lean.recompute == layer + attention
