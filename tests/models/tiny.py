"""Tiny real parts: the classes of transformers, a few thousand parameters."""

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from vlm.batch import Batch, build_batch
from vlm.models.baselines import BlindConfig, BlindModel, MultiTokenConfig, MultiTokenModel
from vlm.models.foveated import FoveatedConfig, FoveatedModel
from vlm.models.one_pass import Projected
from vlm.models.perceiver import PerceiverFamilyConfig, PerceiverModel
from vlm.models.prefix import PrefixConfig, PrefixModel

IMAGE = 3
VOCAB = 50
SIZE = 16

VISION = {
    "model_type": "dinov2",
    "image_size": SIZE,
    "patch_size": 8,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_ratio": 2,
    "initializer_range": 0.3,
    "layerscale_value": 0.7,
}
LANGUAGE = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "initializer_range": 0.3,
    "tie_word_embeddings": True,
}
CONNECTOR = {
    "query_dim": 20,
    "query_bias": False,
    "query_std": 1.0,
    "visual_scale": 0.5,
    "coarse_weight": 0.5,
}
#: towers that are read once, of 16 px frames in 4 patches; SigLIP has no CLS
CLIP = {
    "model_type": "clip_vision_model",
    "image_size": SIZE,
    "patch_size": 8,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "initializer_factor": 3.0,
}
SIGLIP = {k: v for k, v in CLIP.items() if k != "initializer_factor"} | {
    "model_type": "siglip_vision_model",
    "vision_use_head": False,
}
PERCEIVER = {
    "kind": "resampler",
    "reads": "all",
    "tokens_per_frame": 3,
    "num_layers": 2,
    "num_heads": 4,
    "mlp_ratio": 2,
    "pool": "none",
}
PREFIX = {
    "kind": "linear",
    "reads": "all",
    "tokens_per_frame": 4,
    "hidden_dim": 40,
    "dropout": 0.0,
}


def make_tower(**changes):
    values = VISION | changes
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    return AutoModel.from_config(config)


def make_lm(**changes):
    values = LANGUAGE | changes
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    return AutoModelForCausalLM.from_config(config)


def make_config(vision=None, language=None, **connector) -> FoveatedConfig:
    return FoveatedConfig(
        vision_config=VISION | (vision or {}),
        language_config=LANGUAGE | (language or {}),
        connector=CONNECTOR | connector,
    )


def make_model(seed: int = 0, **connector) -> FoveatedModel:
    """In float64, so that equality is a matter of arithmetic and not of rounding."""
    torch.manual_seed(seed)
    return FoveatedModel(make_config(**connector)).double().eval()


def make_baseline(seed: int = 0, **connector) -> MultiTokenModel | BlindModel:
    """``multi_token`` with these keys of the connector, ``blind`` without any; in float64."""
    torch.manual_seed(seed)
    if not connector:
        return BlindModel(BlindConfig(language_config=LANGUAGE)).double().eval()
    connector = {"reduction": "pool", "shuffle": 2, "visual_scale": 0.5} | connector
    config = MultiTokenConfig(vision_config=VISION, language_config=LANGUAGE, connector=connector)
    return MultiTokenModel(config).double().eval()


def make_projected(family: str, seed: int = 0, vision=None, **connector) -> Projected:
    """``perceiver`` with a CLIP tower or ``prefix`` with SigLIP; in float64."""
    torch.manual_seed(seed)
    model: Projected
    if family == "perceiver":
        keys = {"vision_config": vision or CLIP, "connector": PERCEIVER | connector}
        model = PerceiverModel(PerceiverFamilyConfig(language_config=LANGUAGE, **keys))
    else:
        keys = {"vision_config": vision or SIGLIP, "connector": PREFIX | connector}
        model = PrefixModel(PrefixConfig(language_config=LANGUAGE, **keys))
    return model.double().eval()


def make_batch(
    samples: list[tuple[int, int]], seed: int = 0, before: int = 0, per_frame: int = 1, size=SIZE
) -> Batch:
    """A batch of (frames, text tokens) samples.

    Args:
        before: text tokens before the frames.
        per_frame: placeholders of a frame.
        size: of frames, px.
    """
    generator = torch.Generator().manual_seed(seed)
    ids, labels = [], []
    for num_frames, num_text in samples:
        text = torch.randint(4, VOCAB, (num_text,), generator=generator).tolist()
        learned = [t if i % 3 else -100 for i, t in enumerate(text, start=1)]
        ids.append(text[:before] + [IMAGE] * (num_frames * per_frame) + text[before:])
        labels.append(learned[:before] + [-100] * (num_frames * per_frame) + learned[before:])
    total = sum(frames for frames, _ in samples)
    pixels = torch.randint(0, 256, (max(1, total), 3, size, size), generator=generator)
    return build_batch(
        frames=pixels.to(torch.uint8),
        frame_counts=[frames for frames, _ in samples],
        input_ids=ids,
        labels=labels,
        image_token_id=IMAGE,
        tokens_per_frame=per_frame,
        keys=[f"k{i}" for i in range(len(samples))],
        kind="video" if total else "text",
    )
