"""Every family and mode in which it trains, tiny, in float64."""

from collections.abc import Callable
from typing import Any

from tests.models import test_cross_attention as cross_attention
from tests.models import tiny
from tests.models.test_latent import make_model as make_latent
from vlm.models import registry

#: what GPT-2 drops if nobody says otherwise
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def make_looking() -> Any:
    recipe = cross_attention.recipe(language={"config": cross_attention.GPT2 | NO_DROPOUT})
    return registry.build(recipe, tiny.VOCAB, 0).double().eval()


#: model, placeholders of a frame, mode
CASES: dict[str, tuple[Callable[[], Any], int, str]] = {
    "coarse and fine": (tiny.make_model, 1, "coarse_fine"),
    "coarse only": (tiny.make_model, 1, "coarse_only"),
    "3 fine passes": (
        lambda: tiny.make_model(fine_passes=3, fine_loss="progressive"),
        1,
        "coarse_fine",
    ),
    "shallow, sees itself": (
        lambda: tiny.make_model(shallow=True, sees_itself=True),
        1,
        "coarse_fine",
    ),
    "joint": (make_latent, 1, "joint"),
    "caption": (make_latent, 1, "caption"),
    "reconstruction": (make_latent, 1, "reconstruction"),
    "unconditioned": (make_latent, 1, "unconditioned"),
    "pooled": (lambda: tiny.make_baseline(tokens_per_frame=4), 4, "one_pass"),
    "pixel shuffle": (
        lambda: tiny.make_baseline(tokens_per_frame=1, reduction="pixel_shuffle"),
        1,
        "one_pass",
    ),
    "blind": (tiny.make_baseline, 0, "one_pass"),
    "cross attention": (make_looking, 0, "one_pass"),
    "perceiver": (lambda: tiny.make_projected("perceiver"), 3, "one_pass"),
    "prefix": (lambda: tiny.make_projected("prefix"), 4, "one_pass"),
}
