"""A tiny model with adapters on a base in a folder, as a recipe makes it."""

from pathlib import Path

import torch

from tests.models.tiny import CLIP, LANGUAGE, PERCEIVER, VOCAB, make_lm
from vlm.config_model import ModelConfig
from vlm.models import registry

#: 4-bit weights are packed in blocks of 64
WIDE = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": VOCAB}
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"rank": 4, "alpha": 8, "targets": SEVEN}


def write_base(folder: Path) -> Path:
    torch.manual_seed(7)
    make_lm(**WIDE).save_pretrained(folder)
    return folder


def recipe(base: Path, lora: dict | None = LORA, quantize: str | None = None, **changes):
    language = {"pretrained": str(base), "quantize": quantize}
    values = {
        "family": "perceiver",
        "vision": {"config": CLIP},
        "language": language | ({} if lora is None else {"lora": lora}),
        "connector": PERCEIVER,
        "tokenizer": "unused",
        "freeze": ["vision"],
    }
    return ModelConfig.model_validate(values | changes)


def trained(config: ModelConfig, vocab_size: int = VOCAB):
    """As after some training: adapters and connector at other values than at the start."""
    model = registry.build(config, vocab_size, 0).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or name.startswith("connector."):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


assert LANGUAGE["tie_word_embeddings"]
