"""What changes the small recipe of ``tests.train.helpers`` to another family."""

import json

from tests.models import cases, tiny
from tests.models import test_cross_attention as cross_attention

GPT2 = {k: v for k, v in cross_attention.GPT2.items() if k != "vocab_size"} | cases.NO_DROPOUT
#: what a recipe changes, by family
FAMILIES = {
    "foveated": (),
    "multi_token": ("model.family=multi_token", "model.connector={tokens_per_frame: 4}"),
    "blind": ("model.family=blind", "model.freeze=[vision, connector]", "model.connector={}"),
    "cross_attention": (
        "model.family=cross_attention",
        f"model.vision={json.dumps({'config': cross_attention.VIT})}",
        f"model.language={json.dumps({'config': GPT2})}",
        "model.connector={}",
    ),
    "foveated_latent": ("model.family=foveated_latent", "model.connector={latent_size: 2}"),
}
#: with dropout a CPU has no attention that keeps what flash attention keeps
NO_DROPOUT = "model.language.config.attention_dropout=0"


def projected(family: str, tower: dict, connector: dict) -> tuple[str, ...]:
    return (
        f"model.family={family}",
        f"model.vision={json.dumps({'config': tower})}",
        f"model.connector={json.dumps(connector)}",
    )


#: their towers have an attention that keeps something else on a CPU
PROJECTED = {
    "perceiver": projected("perceiver", tiny.CLIP, tiny.PERCEIVER),
    "prefix": projected("prefix", tiny.SIGLIP, tiny.PREFIX),
}
