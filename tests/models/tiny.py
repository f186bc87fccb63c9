"""Tiny real parts: the classes of transformers, a few thousand parameters."""

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from vlm.batch import Batch, build_batch
from vlm.models.foveated import FoveatedConfig, FoveatedModel

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


def make_batch(samples: list[tuple[int, int]], seed: int = 0, before: int = 0) -> Batch:
    """A batch of (frames, text tokens) samples; ``before`` text tokens stand before the frames."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = [], []
    for num_frames, num_text in samples:
        text = torch.randint(4, VOCAB, (num_text,), generator=generator).tolist()
        learned = [t if i % 3 else -100 for i, t in enumerate(text, start=1)]
        ids.append(text[:before] + [IMAGE] * num_frames + text[before:])
        labels.append(learned[:before] + [-100] * num_frames + learned[before:])
    total = sum(frames for frames, _ in samples)
    pixels = torch.randint(0, 256, (max(1, total), 3, SIZE, SIZE), generator=generator)
    return build_batch(
        frames=pixels.to(torch.uint8),
        frame_counts=[frames for frames, _ in samples],
        input_ids=ids,
        labels=labels,
        image_token_id=IMAGE,
        tokens_per_frame=1,
        keys=[f"k{i}" for i in range(len(samples))],
        kind="video" if total else "text",
    )
