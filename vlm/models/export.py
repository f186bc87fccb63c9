"""A model on disk without DeepSpeed: whole, or adapters beside what else is the run's own.

Whole: what ``transformers`` writes and loads by itself. With adapters or packed weights the
language model is left out, since ``base`` in ``config.json`` says where it lies:

* ``adapter/``, in PEFT's own format: ``peft`` alone puts it on the language model;
* ``model.safetensors``, all other parts, trained or not;
* ``config.json``.

``merge`` makes a whole model of that. Reading is ``vlm.models.registry.load``'s.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vlm.errors import CheckpointError
from vlm.models.adapters import is_adapted

ADAPTER = "adapter"
#: names of the language model's parameters
LANGUAGE = "language.lm."
#: where the parts lie that transformers knows
PARTS = {"vision": ("vision", "tower"), "language": ("language", "lm")}


def save(model: Any, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Writes a family's model.

    Args:
        weights: all of its state, by name.
    """
    if model.config.base is None:
        model.save_pretrained(folder, state_dict=dict(weights))
        return
    rest = {name: tensor for name, tensor in weights.items() if not name.startswith(LANGUAGE)}
    model.save_pretrained(folder, state_dict=rest)
    lm = model.language.lm
    if is_adapted(lm):
        own = {
            name.removeprefix(LANGUAGE): tensor
            for name, tensor in weights.items()
            if name.startswith(LANGUAGE)
        }
        # the embeddings are those of the base; PEFT would ask the hub whether they are
        lm.save_pretrained(folder / ADAPTER, state_dict=own, save_embedding_layers=False)


def model_name(path: Path, name: str) -> str:
    """The model's name of a tensor in an export's file; PEFT leaves out which adapter it is of."""
    if path.parent.name != ADAPTER:
        return name
    head, _, leaf = name.rpartition(".")
    return f"{LANGUAGE}{head}.default.{leaf}"


def merge(model: Any) -> None:
    """Folds the adapters into the language model's weights, unpacked if they were packed.

    In place. The model then answers as before and is written whole; nothing that was trained is
    left behind, in whatever part.
    """
    lm = model.language.lm
    if is_adapted(lm):
        lm = lm.merge_and_unload()
    model.language.lm = lm
    model.config.language_config = plain_config(lm)
    model.config.base = None


def part(model: Any, name: str | None) -> Any:
    """The model, or the transformers model that is one of its parts.

    Raises:
        CheckpointError: its family has no such part.
    """
    if name is None:
        return model
    owner, attribute = PARTS[name]
    if not hasattr(model, owner):
        raise CheckpointError(f"a {model.config.model_type} model has no {name} to write")
    return getattr(getattr(model, owner), attribute)


def plain_config(lm: Any) -> dict[str, Any]:
    """The language model's own configuration, without how its weights are stored here."""
    return {k: v for k, v in lm.config.to_dict().items() if k != "quantization_config"}
