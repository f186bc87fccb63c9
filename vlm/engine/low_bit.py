"""4-bit weights of bitsandbytes under DeepSpeed: what is safe, and what would corrupt them.

They are stored as numbers of another type, two weights to a byte. DeepSpeed casts all parameters of
floating types to the training precision and under ZeRO-3 cuts them into shares; done to packed
weights in the wrong storage type, either changes their bits without a word. Nothing here quantises.
"""

from typing import Any

import torch
from torch import nn

from vlm.errors import ConfigError

WEIGHTS_PER_BYTE = 2
OFFLOADS = ("offload_optimizer", "offload_param")
WORKS = (
    "use ZeRO stage 1 or 2 without offload (ds_configs/zero2.json), or leave out "
    "model.language.quantize"
)


def is_packed(parameter: nn.Parameter) -> bool:
    # not by class: bitsandbytes need not be installed
    return hasattr(parameter, "quant_state")


def num_weights(parameter: nn.Parameter) -> int:
    """Weights that a parameter stands for, however it is stored."""
    # under ZeRO-3 the tensor itself is empty and ds_numel holds the true size
    numel = parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()
    return numel * parameter.element_size() * WEIGHTS_PER_BYTE if is_packed(parameter) else numel


def check_packed(model: nn.Module, ds_config: dict[str, Any]) -> None:
    """Refuses packed weights where DeepSpeed would change their bits.

    Args:
        ds_config: from ``vlm.engine.ds_config.resolve``.

    Raises:
        ConfigError: with the first such parameter, and what works.
    """
    packed = {name: p for name, p in model.named_parameters() if is_packed(p)}
    if not packed:
        return
    zero = ds_config["zero_optimization"]
    offloaded = [
        key for key in OFFLOADS if zero.get(key) and zero[key].get("device", "none") != "none"
    ]
    name, parameter = next(iter(packed.items()))
    if zero["stage"] == 3:
        raise ConfigError(
            f"{name} has 4-bit weights, which ZeRO-3 cannot share out: it cuts a parameter into "
            f"ranges, and what unpacks the bytes stays behind; {WORKS}"
        )
    if offloaded:
        raise ConfigError(
            f"{name} has 4-bit weights, and zero_optimization.{offloaded[0]} moves what is trained "
            "to the host, where the few adapters save nothing and every step waits for them; "
            f"{WORKS}"
        )
    if strange := {n: p for n, p in packed.items() if p.dtype != torch.uint8}:
        name, parameter = next(iter(strange.items()))
        raise ConfigError(
            f"{name} has 4-bit weights stored as {str(parameter.dtype).removeprefix('torch.')}, "
            "which DeepSpeed would cast as if they were numbers; store them as uint8 "
            "(bnb_4bit_quant_storage)"
        )
