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


def is_packed(parameter: nn.Parameter) -> bool:
    # not by class: bitsandbytes need not be installed
    return hasattr(parameter, "quant_state")


def num_weights(parameter: nn.Parameter) -> int:
    """Weights that a parameter stands for, however it is stored."""
    # under ZeRO-3 the tensor itself is empty and ds_numel holds the true size
    numel = parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()
    return numel * parameter.element_size() * WEIGHTS_PER_BYTE if is_packed(parameter) else numel


def check_packed(model: nn.Module, ds_config: dict[str, Any], cpu: bool) -> None:
    """Refuses packed weights where DeepSpeed would change their bits.

    Args:
        ds_config: from ``vlm.engine.ds_config.resolve``.

    Raises:
        ConfigError: with the first such parameter.
    """
    packed = {name: p for name, p in model.named_parameters() if is_packed(p)}
    if not packed:
        return
    stage = ds_config["zero_optimization"]["stage"]
    bf16 = ds_config.get("bf16", {}).get("enabled", False)
    for name, parameter in packed.items():
        stored = str(parameter.dtype).removeprefix("torch.")
        if cpu:
            raise ConfigError(
                f"{name} has 4-bit weights, which train on a GPU only; load it without them"
            )
        if stage == 3 and parameter.dtype != torch.bfloat16:
            raise ConfigError(
                f"{name} has 4-bit weights stored as {stored}, which ZeRO-3 cannot share out; "
                "store them as bfloat16 (bnb_4bit_quant_storage), or use stage 2"
            )
        if parameter.dtype not in (torch.uint8, torch.bfloat16):
            raise ConfigError(
                f"{name} has 4-bit weights stored as {stored}, which DeepSpeed would cast as if "
                "they were numbers; store them as uint8 or bfloat16 (bnb_4bit_quant_storage)"
            )
        if parameter.dtype == torch.bfloat16 and not bf16:
            raise ConfigError(
                f"{name} has 4-bit weights stored as bfloat16, which DeepSpeed would cast to "
                "another precision; set bf16.enabled to true, or store them as uint8"
            )
