"""What all families share: what a forward pass returns, how a configuration holds their parts.

A family is a ``PreTrainedModel`` with ``vision``, ``connector`` and ``language`` (or some of them):

* ``modes``, all its forward modes, the first of which is its own; ``train_modes`` have a gradient,
  and ``passes`` names the passes whose losses each of them reports, the last one first;
* ``forward(batch, mode, measure_all) -> Output``;
* ``losses_by_mode(batch)``, what evaluation reports;
* ``prefill(batch, mode) -> Prefill``, for ``generate``.

Not here: the families themselves, and what the parts compute.
"""

from dataclasses import field
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig

from vlm.errors import CheckpointError


class Output(NamedTuple):
    """Sums over learned tokens, never means: who trains divides by the global count."""

    #: what is trained on
    loss_sum: Tensor
    #: what it is made of, and what was measured beside it, by name
    parts: dict[str, Tensor]
    #: (T,) detached, of each learned token, of the part that matters most; None: not measured
    token_losses: Tensor | None = None
    #: (2,) each, by name: a sum over frames or the like, and of how many (``vlm.models.looks``)
    measures: dict[str, Tensor] = {}
    #: "coarse", "fine" -> (F, rows, columns) attention of that pass to patches, where measured
    maps: dict[str, Tensor] = {}


class Prefill(NamedTuple):
    """Prompts that have been read."""

    #: (S, L, H), pads on the right
    hidden: Tensor
    #: keys and values, L entries for each sample
    cache: Any
    #: (S,) tokens of each sample
    lengths: Tensor


class FamilyConfig(PreTrainedConfig):
    """The parts' own configurations, and the connector's keys as in a recipe."""

    vision_config: dict[str, Any] = field(default_factory=dict)
    language_config: dict[str, Any] = field(default_factory=dict)
    connector: dict[str, Any] = field(default_factory=dict)
    #: where an export leaves out the language model: what to load, and how; see ``Base``
    base: dict[str, Any] | None = None


class Base(NamedTuple):
    """A language model that adapters or packed weights stand on."""

    pretrained: str
    quantize: str | None
    vocab_size: int


def random_tower(config: FamilyConfig) -> nn.Module:
    return AutoModel.from_config(_part(config.vision_config))


def random_lm(config: FamilyConfig) -> nn.Module:
    """
    Raises:
        CheckpointError: the language model is not part of the export, so a random one is wrong.
    """
    if config.base is not None:
        raise CheckpointError(
            f"model {config.name_or_path}: holds adapters of {config.base['pretrained']} and not "
            "that model; load it with vlm.models.registry.load, or make it whole with "
            "tools/merge_adapter.py"
        )
    return AutoModelForCausalLM.from_config(_part(config.language_config))


def _part(values: dict[str, Any]) -> PreTrainedConfig:
    values = dict(values)
    return AutoConfig.for_model(values.pop("model_type"), **values)
