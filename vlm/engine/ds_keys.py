"""The keys of a DeepSpeed file: which work here, and why the others do not.

DeepSpeed 0.19 ignores a key it does not know at the top level and in half of its sections, so a
misspelt ``gradient_clipping`` trains with another value and nobody is told. ``schema`` is therefore
a closed list. DeepSpeed's own models stand for its sections where it has any, so that names, types
and ranges are those of the installed version.
"""

import functools
from collections.abc import Iterator
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

#: Keys that the recipe owns: dotted key -> where the recipe sets it
OWNED_BY_RECIPE = {
    "optimizer": "optim.lr, optim.weight_decay, optim.betas, optim.eps",
    "scheduler": "optim.schedule",
    "train_batch_size": "data.micro_batches",
    "train_micro_batch_size_per_gpu": "data.budget",
    "gradient_accumulation_steps": "data.micro_batches (divided by the number of ranks)",
    "wandb": "log.wandb",
    "tensorboard": "log.tensorboard",
    "csv_monitor": "nothing: metrics.csv is always written",
    "comet": "nothing: metrics.csv and log.wandb hold the same numbers",
    "activation_checkpointing": "model.vision.gradient_checkpointing,"
    " model.connector.gradient_checkpointing and model.language.gradient_checkpointing"
    " (DeepSpeed's section does nothing to such models)",
}

_REMOVED = "DeepSpeed removed it; take it out"
_PRECISION = "bf16.enabled and fp16.enabled decide it; take it out"
_PLAN = "the training plan cuts the batches; take it out"
_LOSS = "the loss is divided by the tokens of the whole step, which this would scale again"
_COMMIT = "a checkpoint is written aside and published by one rename, which this would break"
_NORM = "every step's gradient norm is checked and logged"

#: Keys that DeepSpeed may know but that do not work here: dotted key -> why
REFUSED = {
    "nebula": _REMOVED,
    "compression_training": _REMOVED,
    "amp": "DeepSpeed removed it; use bf16 or torch_autocast",
    "quantize_training": _REMOVED,
    "sparse_gradients": _REMOVED,
    "eigenvalue": _REMOVED,
    "sparse_attention": _REMOVED,
    "elasticity": "DeepSpeed removed it; any number of ranks that divides data.micro_batches works",
    "graph_harvesting": _REMOVED,
    "curriculum_learning": _REMOVED,
    "progressive_layer_drop": _REMOVED,
    "zero_optimization.mics_shard_size": _REMOVED,
    "zero_optimization.mics_hierarchical_params_gather": _REMOVED,
    "zero_optimization.zeropp_loco_param": _REMOVED,
    "bfloat16": "use bf16",
    "zero_optimization.cpu_offload": "deprecated; use offload_optimizer.device",
    "zero_optimization.cpu_offload_param": "deprecated; use offload_param.device",
    "zero_optimization.cpu_offload_use_pin_memory": "deprecated; use offload_optimizer.pin_memory",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "deprecated; use"
    " stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.elastic_checkpoint": _REMOVED,
    "zero_optimization.legacy_stage1": "deprecated; take it out",
    "zero_optimization.compute_grad_norm": _NORM,
    "zero_optimization.zenflow": "it overrides gradient accumulation, which the recipe owns",
    "zero_optimization.offload_optimizer.super_offload": "not supported here; use device",
    "bf16.bf16_master_weights_and_grads": "master weights stay in fp32; take it out",
    "bf16.bf16_optimizer_states": "optimizer states stay in fp32; take it out",
    "fp16.fp16_master_weights_and_grads": "master weights stay in fp32; take it out",
    "data_types.param_dtype": _PRECISION,
    "data_types.buffer_dtype": "buffers keep their precision: rotary frequencies in 16 bits are a"
    " radian off at position 1000",
    "prescale_gradients": _LOSS,
    "gradient_predivide_factor": _LOSS,
    "gradient_allreduce_op": _LOSS,
    "managed_gradient_accumulation": "the engine sets the accumulation boundary; take it out",
    "dataloader_drop_last": _PLAN,
    "data_efficiency": _PLAN,
    "compile": "compiled ZeRO hangs on inputs of changing length; take it out",
    "checkpoint.load_universal": "resume decides it from the checkpoint; take it out",
    "checkpoint.use_node_local_storage": _COMMIT,
    "checkpoint.parallel_write": _COMMIT,
    "checkpoint.writer": _COMMIT,
    "datastates_ckpt": _COMMIT,
    "pipeline": "not supported here; take it out",
    "tensor_parallel": "not supported here; take it out",
    "expert_parallel": "not supported here; take it out",
    "sequence_parallel_size": "not supported here; take it out",
    "hybrid_engine": "not supported here; take it out",
    "autotuning": "not supported here; take it out",
    "weight_quantization": "not supported here; take it out",
}


class _Section(BaseModel):
    """A section that DeepSpeed reads without a model of its own."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _DataTypes(_Section):
    grad_accum_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    keep_in_fp32_modules: list[str] = []


class _TorchAutocast(_Section):
    enabled: bool
    dtype: Literal["bfloat16", "bf16"]
    lower_precision_safe_modules: list[str] = []


class _Checkpoint(_Section):
    tag_validation: Literal["Ignore", "Warn", "Fail"] = "Fail"


class _Aio(_Section):
    block_size: int = Field(1, gt=0)
    queue_depth: int = Field(1, gt=0)
    intra_op_parallelism: int = Field(1, gt=0)
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: bool = False


class _FlopsProfiler(_Section):
    enabled: bool = False
    profile_step: int = Field(1, gt=0)
    module_depth: int = -1
    top_modules: int = Field(1, gt=0)
    detailed: bool = True
    output_file: str | None = None
    recompute_fwd_factor: float = Field(0.0, ge=0)


@functools.cache
def schema() -> type[BaseModel]:
    """The whole file as one model. It checks; its defaults go nowhere."""
    # Not at the top: this import takes seconds and picks the accelerator for good, and a caller
    # may first want to say which (vlm.engine.cpu).
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    class Timers(_Section):
        throughput: DeepSpeedThroughputTimerConfig = DeepSpeedThroughputTimerConfig()

    class DeepSpeedFile(_Section):
        gradient_clipping: float = Field(ge=0)
        zero_optimization: DeepSpeedZeroConfig
        bf16: DeepSpeedBF16Config = DeepSpeedBF16Config()
        fp16: DeepSpeedFP16Config = DeepSpeedFP16Config()
        torch_autocast: _TorchAutocast = _TorchAutocast(enabled=False, dtype="bfloat16")
        data_types: _DataTypes = _DataTypes()
        communication_data_type: Literal["fp32", "bf16", "fp16"] = "fp32"
        zero_allow_untested_optimizer: bool = True
        zero_force_ds_cpu_optimizer: bool = False
        checkpoint: _Checkpoint = _Checkpoint()
        aio: _Aio = _Aio()
        comms_logger: CommsLoggerConfig = CommsLoggerConfig()
        flops_profiler: _FlopsProfiler = _FlopsProfiler()
        timers: Timers = Timers()
        wall_clock_breakdown: bool = False
        memory_breakdown: bool = False
        steps_per_print: int = Field(1, gt=0)
        disable_python_gc: bool = False
        dump_state: bool = False

    return DeepSpeedFile


def fields(model: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    """Name of every key of ``model``, aliases included, with the model below it if it has one."""
    out: dict[str, type[BaseModel] | None] = {}
    for name, field in model.model_fields.items():
        kinds: tuple[Any, ...] = (field.annotation, *get_args(field.annotation))
        below = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        for key in {name, field.alias or name}:
            out[key] = below[0] if below else None
    return out


def walk(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in ``tree``, sections before what they hold."""
    for key, value in tree.items():
        yield prefix + key, value
        if isinstance(value, dict):
            yield from walk(value, f"{prefix}{key}.")
