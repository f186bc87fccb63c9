"""Which families there are, and how a recipe becomes a model."""

import copy
import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import peft
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from vlm.config_model import (
    FoveationConfig,
    LanguageConfig,
    ModelConfig,
    PartConfig,
    VisionConfig,
)
from vlm.errors import CheckpointError, ConfigError, one_line
from vlm.models import adapters, export
from vlm.models.baselines import BlindModel, MultiTokenModel
from vlm.models.cross_attention import CrossAttentionModel
from vlm.models.family import Base, FamilyConfig
from vlm.models.foveated import FoveatedModel
from vlm.models.latent import FoveatedLatentModel
from vlm.models.perceiver import PerceiverModel
from vlm.models.prefix import PrefixModel
from vlm.models.tower import TOWERS

FAMILIES: dict[str, Any] = {
    "foveated": FoveatedModel,
    "foveated_latent": FoveatedLatentModel,
    "multi_token": MultiTokenModel,
    "blind": BlindModel,
    "perceiver": PerceiverModel,
    "prefix": PrefixModel,
    "cross_attention": CrossAttentionModel,
}
#: language models whose blocks can have an attention to something else
LOOKING = ("gpt2",)
#: what transformers raises when a config cannot be built: it checks little before it computes
BUILD_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    StrictDataclassError,
)
LOAD_ERRORS = (OSError, SafetensorError, *BUILD_ERRORS)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps its progress bars and advice to itself: they would come from every rank."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@quiet_transformers()
def build(config: ModelConfig, vocab_size: int, seed: int) -> Any:
    """The model of a recipe: parts from pretrained weights or at random, the rest from ``seed``.

    In float32, whatever the weights were stored in: precision is DeepSpeed's to choose. On the
    meta device nothing is loaded, shapes are all there is.

    Raises:
        ConfigError: no such part, or parts that do not fit each other.
    """
    torch.manual_seed(seed)
    language = part_config(config.language, "language")
    if language.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(
            f"model.language: found model_type {language.model_type!r}, which is no causal "
            "language model; expected one such as llama"
        )
    if config.language.config is not None and "vocab_size" not in config.language.config:
        language.vocab_size = vocab_size  # the class's default is some other tokenizer's
    if config.language.pretrained is None or _is_meta():
        language.vocab_size = max(language.vocab_size, vocab_size)
    if config.family == "cross_attention":
        _let_look(config.language, language)
    tower = None if config.family == "blind" else _tower(config)
    lm = _language(config.language, language, vocab_size, FAMILIES[config.family].new_weights)
    if tower is not None and config.vision.position_std is not None:
        where = TOWERS[tower.config.model_type].positions
        assert where is not None, tower.config.model_type  # refused by _check_vision
        nn.init.normal_(attrgetter(where)(tower), std=config.vision.position_std)
    family = FAMILIES[config.family]
    family_config = family.config_class(
        vision_config={} if tower is None else tower.config.to_dict(),
        language_config=export.plain_config(lm),
        connector=config.connector.model_dump(exclude={"gradient_checkpointing"}),
    )
    if config.language.lora is not None or config.language.quantize is not None:
        part, size = config.language, lm.get_input_embeddings().num_embeddings
        family_config.base = Base(str(part.pretrained), part.quantize, size)._asdict()
    model = family(family_config, tower, lm)
    if config.language.lora is not None:
        model.language.lm = adapters.add_lora(lm, config.language.lora)
    if tower is not None:
        model.vision.gradient_checkpointing = config.vision.gradient_checkpointing
    if isinstance(config.connector, FoveationConfig):
        model.connector.gradient_checkpointing = config.connector.gradient_checkpointing
    if config.language.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    return model


@quiet_transformers()
def load(path: Path, *, packed: bool = True) -> Any:
    """A model that ``vlm.models.export.save`` wrote.

    Args:
        packed: 4-bit weights stay so; else they become numbers again, of the same values.

    Raises:
        CheckpointError: no such folder, another kind of model, or weights that are not all there.
    """
    if not (path / "config.json").is_file():
        raise CheckpointError(f"model {path}: no config.json there; expected an exported model")
    try:
        found = AutoConfig.from_pretrained(path).model_type
        families = {family.config_class.model_type: family for family in FAMILIES.values()}
        if found not in families:
            raise CheckpointError(
                f"model {path}: found a {found} model, expected one of {', '.join(families)}"
            )
        config = families[found].config_class.from_pretrained(path)
        if config.base is not None:
            return _load_adapted(families[found], config, path, packed)
        model, report = families[found].from_pretrained(
            path, output_loading_info=True, use_safetensors=True
        )
    except LOAD_ERRORS as error:
        raise CheckpointError(f"model {path}: {_brief(error)}") from error
    if faults := [f"{len(v)} {kind}, the first: {_first(v)}" for kind, v in report.items() if v]:
        raise CheckpointError(f"model {path}: the weights do not fit: {'; '.join(faults)}")
    return model


def _load_adapted(family: Any, config: FamilyConfig, path: Path, packed: bool) -> Any:
    """The base that an export names, its adapters, and all else from the export itself."""
    assert config.base is not None
    base = Base(**config.base)
    part = LanguageConfig.model_validate({"pretrained": base.pretrained, "quantize": base.quantize})
    lm = _language(part, part_config(part, "language"), base.vocab_size)
    model = family(config, None, lm)
    if base.quantize and not packed:
        lm = lm.dequantize()  # not before: a family starts modules anew that it finds unmarked
        model.language.lm = lm
    own = load_file(path / "model.safetensors")
    _check_names(path, {n for n in model.state_dict() if not n.startswith(export.LANGUAGE)}, own)
    model.load_state_dict(own, strict=False)
    adapter = path / export.ADAPTER
    if adapter.is_dir() or base.quantize is None:  # packed weights may be all that stands on a base
        found = load_file(adapter / "adapter_model.safetensors")
        lm = peft.PeftModel.from_pretrained(lm, adapter)
        # PEFT leaves adapters that it does not find at what adds nothing
        expected = peft.get_peft_model_state_dict(lm, save_embedding_layers=False)
        _check_names(adapter, expected, found)
        model.language.lm = lm
    return model


def _check_names(path: Path, expected: Iterable[str], found: Iterable[str]) -> None:
    if differ := set(expected) ^ set(found):
        raise CheckpointError(
            f"model {path}: the weights do not fit: {len(differ)} are missing or too many, the "
            f"first: {_first(differ)}"
        )


def _first(names: Iterable[object]) -> str:
    """Of what a file holds, which may be anything, as much as an error needs."""
    return one_line(min(map(str, names)))[:200]


def part_config(part: PartConfig, name: str) -> PreTrainedConfig:
    """The transformers config of a part, with every key known."""
    if part.pretrained is not None:
        try:
            return AutoConfig.from_pretrained(part.pretrained)
        except LOAD_ERRORS as error:
            where = f"model.{name}.pretrained {part.pretrained!r}"
            raise ConfigError(f"{where}: {_brief(error)}") from None
    values: dict[str, Any] = copy.deepcopy(part.config or {})  # transformers writes into it
    try:
        config = AutoConfig.for_model(values.pop("model_type"), **values)
    except BUILD_ERRORS as error:
        raise ConfigError(f"model.{name}.config: {_brief(error)}") from None
    # transformers keeps keys that it does not know without a word
    known = type(config)().to_dict()
    if unknown := sorted(set(values) - set(known)):
        raise ConfigError(
            f"model.{name}.config: unknown keys for {config.model_type}: "
            + ", ".join(_suggest(key, known) for key in unknown)
        )
    return config


def _let_look(part: LanguageConfig, config: PreTrainedConfig) -> None:
    """Gives the blocks of a language model a second attention."""
    if config.model_type not in LOOKING:
        raise ConfigError(
            f"model.language: found model_type {config.model_type!r}, whose blocks cannot look at "
            f"anything; family cross_attention takes {', '.join(LOOKING)}"
        )
    if part.lora is not None or part.quantize is not None:
        raise ConfigError(
            "model.language: lora and quantize leave the base as it is, but family "
            "cross_attention adds weights to it that must train; remove them"
        )
    config.add_cross_attention = True


def _language(
    part: LanguageConfig, config: PreTrainedConfig, vocab_size: int, new: tuple[str, ...] = ()
) -> Any:
    """The language model with a row for every token.

    Rows that pretrained weights lack start as the mean of theirs: the same whoever loads them, and
    no new token is likelier than the others.
    """
    options = adapters.nf4_options() if part.quantize and not _is_meta() else {}
    lm = _part(part, config, AutoModelForCausalLM, "language", options, new)
    adapters.keep_layout(lm)
    old = lm.get_input_embeddings().num_embeddings
    if old < vocab_size:
        lm.resize_token_embeddings(vocab_size, mean_resizing=False)
        for module in (lm.get_input_embeddings(), lm.get_output_embeddings()):
            rows = module.weight.data
            rows[old:] = rows[:old].mean(0)
    return lm


def _tower(model: ModelConfig) -> Any:
    part = model.vision
    config = part_config(part, "vision")
    # a checkpoint of image and text holds the tower beside the rest
    config = config.vision_config if hasattr(config, "vision_config") else config
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False  # a pooled token, which no family reads
    _check_vision(part, config, model.family)
    return _part(part, config, AutoModel, "vision")


def _suggest(key: str, known: dict[str, Any]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"{key} (did you mean {close[0]}?)" if close else key


def _check_vision(part: VisionConfig, config: PreTrainedConfig, family: str) -> None:
    known = FAMILIES[family].towers
    if config.model_type not in known:
        raise ConfigError(
            f"model.vision: found model_type {config.model_type!r}, which family {family} cannot "
            f"read; expected one of {', '.join(known)}"
        )
    if config.num_attention_heads < 1 or config.hidden_size % config.num_attention_heads:
        raise ConfigError(
            f"model.vision: hidden_size {config.hidden_size} is not a multiple of "
            f"num_attention_heads {config.num_attention_heads}"
        )
    if part.position_std is not None and part.pretrained is not None:
        raise ConfigError(
            "model.vision.position_std: pretrained weights bring their own position embeddings; "
            "remove it"
        )
    if part.position_std is not None and TOWERS[config.model_type].positions is None:
        raise ConfigError(
            f"model.vision.position_std: a {config.model_type} tower has rotary positions, no "
            "embeddings of them; remove it"
        )


def _part(
    part: PartConfig,
    config: PreTrainedConfig,
    auto: Any,
    name: str,
    options: dict[str, Any] | None = None,
    new: tuple[str, ...] = (),
) -> Any:
    """A part's model: its pretrained weights, all of them but the ``new``, or random ones."""
    where = f"model.{name}" if part.pretrained is None else f"model.{name} {part.pretrained!r}"
    try:
        if part.pretrained is None or _is_meta():
            return auto.from_config(config, dtype=torch.float32)
        model, report = auto.from_pretrained(
            part.pretrained,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,
            **(options or {}),
        )
    except LOAD_ERRORS as error:
        raise ConfigError(f"{where}: {_brief(error)}") from error
    # what a checkpoint holds beside the part is not needed; what it lacks would start at random
    lacking = [*map(str, report["missing_keys"]), *map(str, report["mismatched_keys"])]
    lacking = [name for name in lacking if not any(one in name for one in new)]
    if lacking:
        raise ConfigError(
            f"{where}: {len(lacking)} weights of {type(model).__name__} are missing or of another "
            f"shape, the first: {_first(lacking)}"
        )
    return model


def _is_meta() -> bool:
    return torch.get_default_device().type == "meta"


def _brief(error: BaseException) -> str:
    """The start of an error of transformers, which may go on for pages."""
    return f"{type(error).__name__}: {one_line(error)[:300]}"


for _family in FAMILIES.values():
    AutoConfig.register(_family.config_class.model_type, _family.config_class)
    AutoModel.register(_family.config_class, _family)
