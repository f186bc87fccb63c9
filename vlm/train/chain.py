"""Stages one after another: a run that starts from the weights of another one.

A run that lacks its stage before trains on noise for its whole price, so what ``model.init_from``
names must be there, whole, and fit. Not here: going on with the same run (``vlm.ckpt.load``).
"""

import logging
from pathlib import Path

import torch
from torch import nn

from vlm.ckpt.keep import COMPLETE
from vlm.ckpt.save import BEST, MODEL
from vlm.engine.low_bit import is_packed
from vlm.errors import ConfigError, one_line
from vlm.models import registry
from vlm.models.adapters import is_packed_copy

log = logging.getLogger(__name__)

KEY = "model.init_from"
ADVICE = f"finish that stage first, name one of its checkpoints, or set {KEY} to null to start anew"
#: what PEFT puts into the names of a module that it wraps
WRAPPERS = (".base_model.model", ".base_layer")


def find_model(path: Path) -> Path:
    """The exported model of a run (of its best checkpoint), of a checkpoint, or ``path`` itself.

    Raises:
        ConfigError: there is none, or it is not whole.
    """
    if (path / "checkpoints").is_dir():
        pointer = path / "checkpoints" / BEST
        if not pointer.is_file():
            raise ConfigError(
                f"{KEY} {path}: found no best checkpoint, since no step that was saved was "
                f"evaluated; {ADVICE}"
            )
        name = pointer.read_text(encoding="utf-8").strip()
        if Path(name).name != name:
            raise ConfigError(f"{KEY} {path}: {pointer} names {name!r}, expected one checkpoint")
        path = path / "checkpoints" / name
    if (path / MODEL).is_dir():
        if not (path / COMPLETE).is_file():
            raise ConfigError(f"{KEY} {path}: the checkpoint was never finished; {ADVICE}")
        path = path / MODEL
    if not (path / "config.json").is_file():
        raise ConfigError(f"{KEY} {path}: found no run, checkpoint or exported model; {ADVICE}")
    return path


def load_weights(model: nn.Module, path: Path) -> None:
    """Puts the weights of ``find_model(path)`` into ``model``; adapters keep their own.

    Packed weights stay as they are: they are checked to be those of the stage before.

    Raises:
        ConfigError: they are not all there, or of another shape.
    """
    found = find_model(path)
    source = {_plain(name): tensor for name, tensor in registry.load(found).state_dict().items()}
    own = model.state_dict()
    packed = {name: p for name, p in model.named_parameters() if is_packed(p)}
    differ = []
    for name, tensor in own.items():
        given = source.pop(_plain(name), None)
        if name in packed:
            if given is None or not is_packed_copy(packed[name], given):
                differ.append(
                    f"{name} is packed from other weights than were trained; name the language "
                    "model that was, merged, in model.language.pretrained"
                )
            continue
        if f"{name.partition('.weight.')[0]}.weight" in packed:
            continue  # what unpacks the bytes that were just compared
        if given is None and "lora_" in name:
            continue
        if given is None or given.shape != tensor.shape:
            shape = "nothing" if given is None else tuple(given.shape)
            differ.append(f"{name} is {tuple(tensor.shape)}, found {shape}")
            continue
        with torch.no_grad():
            tensor.copy_(given)
    differ += [f"{name} belongs nowhere" for name in source if "lora_" not in name]
    if differ:
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise ConfigError(
            f"{KEY} {one_line(str(found))}: another model than the recipe's: "
            f"{'; '.join(differ[:3])}{more}"
        )
    log.info("starting from the weights of %s", found)


def _plain(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
