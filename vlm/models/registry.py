"""Which families there are, and how a recipe becomes a model."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig

from vlm.config import ModelConfig, PartConfig
from vlm.errors import CheckpointError, ConfigError
from vlm.models.foveated import FoveatedConfig, FoveatedModel
from vlm.models.vision import QUERYABLE, init_positions

FAMILIES = {"foveated": FoveatedModel}


def build(config: ModelConfig, vocab_size: int, seed: int) -> FoveatedModel:
    """The model of a recipe: parts from pretrained weights or at random, the rest from ``seed``.

    Raises:
        ConfigError: no such family or part, or parts that do not fit each other.
    """
    if config.family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ConfigError(f"model.family: found {config.family!r}, expected one of {known}")
    torch.manual_seed(seed)
    vision, language = (
        part_config(config.vision, "vision"),
        part_config(config.language, "language"),
    )
    if vision.model_type not in QUERYABLE:
        raise ConfigError(
            f"model.vision: found model_type {vision.model_type!r}, whose layers cannot be "
            f"queried; expected one of {', '.join(QUERYABLE)}"
        )
    if config.language.pretrained is None:
        language.vocab_size = max(language.vocab_size, vocab_size)
    tower, lm = _tower(config.vision, vision), _language_model(config.language, language)
    if lm.get_input_embeddings().num_embeddings < vocab_size:
        lm.resize_token_embeddings(vocab_size)
    family_config = FoveatedConfig(
        vision_config=tower.config.to_dict(),
        language_config=lm.config.to_dict(),
        connector=config.connector.model_dump(),
    )
    model = FoveatedModel(family_config, tower, lm)
    model.vision.gradient_checkpointing = config.vision.gradient_checkpointing
    if config.language.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def load(path: Path) -> FoveatedModel:
    """A model that ``save_pretrained`` wrote.

    Raises:
        CheckpointError: no such folder, another kind of model, or weights that are not all there.
    """
    if not (path / "config.json").is_file():
        raise CheckpointError(f"model {path}: no config.json there; expected an exported model")
    if AutoConfig.from_pretrained(path).model_type != FoveatedConfig.model_type:
        raise CheckpointError(f"model {path}: not a {FoveatedConfig.model_type} model")
    model, report = FoveatedModel.from_pretrained(path, output_loading_info=True)
    if faults := {k: v for k, v in report.items() if v}:
        raise CheckpointError(f"model {path}: the weights do not fit: {faults}")
    return model


def part_config(part: PartConfig, name: str) -> PreTrainedConfig:
    """The transformers config of a part, with every key known."""
    if part.pretrained is not None:
        try:
            return AutoConfig.from_pretrained(part.pretrained)
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(f"model.{name}.pretrained {part.pretrained!r}: {reason}") from None
    values: dict[str, Any] = dict(part.config or {})
    try:
        config = AutoConfig.for_model(values.pop("model_type"), **values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model.{name}.config: {error}") from None
    # transformers keeps keys that it does not know without a word
    unknown = sorted(set(values) - set(type(config)().to_dict()))
    if unknown:
        raise ConfigError(
            f"model.{name}.config: unknown keys {', '.join(unknown)} for {config.model_type}"
        )
    return config


def _tower(part: PartConfig, config: PreTrainedConfig) -> nn.Module:
    if part.pretrained is not None:
        return AutoModel.from_pretrained(part.pretrained)
    tower = AutoModel.from_config(config)
    if part.position_init == "sincos":
        init_positions(tower.embeddings.position_embeddings)
    return tower


def _language_model(part: PartConfig, config: PreTrainedConfig) -> nn.Module:
    if part.pretrained is not None:
        return AutoModelForCausalLM.from_pretrained(part.pretrained)
    return AutoModelForCausalLM.from_config(config)


AutoConfig.register(FoveatedConfig.model_type, FoveatedConfig)
AutoModel.register(FoveatedConfig, FoveatedModel)
