"""What must happen in a process before DeepSpeed starts in it.

``prepare_cpu`` and ``safe_loading`` change the process for good and are called by entry points,
never at import.
"""

import os

import torch


def on_cpu() -> bool:
    """Whether to compute on the CPU: there is no GPU, or DS_ACCELERATOR=cpu asks to leave it."""
    return os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()


def prepare_cpu() -> None:
    """Makes DeepSpeed compute on the CPU without compiling anything. Before any other import of it.

    Unprepared, DeepSpeed compiles a shared-memory collective for about 73 s when it first sets up
    its process group, and again on every host. Gloo does the same work; no other op is missed,
    because the optimizer is torch's.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops  # not at the top: it reads DS_ACCELERATOR and keeps the answer

    deepspeed.ops.__compatible_ops__ = {}


def safe_loading() -> None:
    """Lets ``torch.load`` build tensors and plain values only, whatever its caller asked for.

    DeepSpeed loads its checkpoints as pickles that may run any code. The allowed classes are the
    ones that its own state holds.
    """
    # Not at the top: prepare_cpu must be able to come first.
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    torch.serialization.add_safe_globals(
        [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    )
