"""LoRA adapters and 4-bit weights of the language model: PEFT's and bitsandbytes' own, set up.

A language model with either comes from ``pretrained`` weights that stay as they are, so an export
names them and holds no copy (``vlm.models.export``). Not here: what trains (``vlm.engine.optim``),
and which DeepSpeed stages leave packed weights alone (``vlm.engine.low_bit``).
"""

import importlib.util
import warnings
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import BitsAndBytesConfig

from vlm.config_model import LoraConfig
from vlm.errors import ConfigError

#: model type -> maps of its attention, where a recipe names none
TARGETS = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mistral": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "qwen2": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "qwen3": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "gemma2": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "phi": ("q_proj", "k_proj", "v_proj", "dense"),
    "phi3": ("qkv_proj", "o_proj"),
    "gpt2": ("c_attn", "c_proj"),
    "opt": ("q_proj", "v_proj"),
}
#: model types whose maps are stored input first
TRANSPOSED = ("gpt2",)


def add_lora(lm: Any, config: LoraConfig) -> Any:
    """The language model in PEFT's wrapper; the adapters add nothing until they are trained.

    Raises:
        ConfigError: no targets are known for it, or it has no such modules.
    """
    kind = lm.config.model_type
    targets = config.targets or TARGETS.get(kind)
    if targets is None:
        raise ConfigError(
            f"model.language.lora.targets: none are known for model_type {kind!r} (only for "
            f"{', '.join(TARGETS)}); name the modules to adapt, such as [q_proj, v_proj]"
        )
    names = {name.rpartition(".")[2] for name, _ in lm.named_modules()}
    if unknown := sorted(set(targets) - names):
        raise ConfigError(
            f"model.language.lora.targets: found {', '.join(unknown)}, but this {kind} model has "
            "no such modules; name some of its linear maps"
        )
    adapted = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(targets),
        fan_in_fan_out=kind in TRANSPOSED,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # PEFT asks transformers by a name that is going away; every rank would say so
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is dep", FutureWarning)
        return peft.get_peft_model(lm, adapted)


def nf4_options() -> dict[str, Any]:
    """What makes ``from_pretrained`` pack weights: NF4, scales quantised too, bf16 arithmetic.

    They are stored as bytes, which DeepSpeed takes for no numbers and leaves as they are.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "model.language.quantize: nf4 needs bitsandbytes, which is not installed; "
            "pip install 'saccade[quantized]', or remove the key"
        )
    device: Any = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.uint8,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def keep_layout(lm: Any) -> None:
    """Stops bitsandbytes from packing weights anew for some CPUs when a model only answers.

    A checkpoint holds their bytes, which would then be others.
    """
    for module in lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_packed_copy(parameter: Any, given: Tensor) -> bool:
    """Whether packed weights stand for the same numbers as others, packed or not."""
    if given.dtype == parameter.dtype:
        return torch.equal(parameter.data, given)
    # optional, and here only where something is packed
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    again: Any = Params4bit(given, requires_grad=False, compress_statistics=True, quant_type="nf4")
    again = again.to(parameter.device)
    one, other = (dequantize_4bit(p.data, p.quant_state) for p in (parameter, again))
    return torch.equal(one.float(), other.float())


def is_adapted(lm: Any) -> bool:
    return isinstance(lm, peft.PeftModel)
