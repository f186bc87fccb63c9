"""From a model and a recipe to a DeepSpeed engine. The only place that calls ``initialize``."""

import os
import warnings
from typing import Any, NamedTuple

import torch
from torch import nn

from vlm.config import Recipe
from vlm.engine import optim
from vlm.engine.cpu import on_cpu, prepare_cpu, safe_loading
from vlm.engine.grad_norms import GradNorms
from vlm.engine.low_bit import check_packed
from vlm.engine.modes import check_modes
from vlm.errors import ConfigError

#: what a launcher says; here, to a process that runs alone, on any free port
SINGLE_PROCESS = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}


class Machine(NamedTuple):
    device: torch.device
    rank: int
    world_size: int


def num_ranks() -> int:
    """Ranks that the launcher started; 1 without a launcher.

    RANK decides: some rented machines set WORLD_SIZE for every process.
    """
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1


def start_process(cpu_threads: int) -> Machine:
    """Joins the process group that the launcher describes; one rank without a launcher.

    Raises:
        ConfigError: the ranks do not meet.
    """
    cpu = on_cpu()
    if cpu:
        prepare_cpu()
        if cpu_threads:
            torch.set_num_threads(cpu_threads)
    safe_loading()
    # DeepSpeed calls collectives by their old names: two lines for every call, thousands a minute
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if "RANK" not in os.environ:
        os.environ.update(SINGLE_PROCESS)
    import deepspeed  # not at the top: prepare_cpu must come first

    try:
        deepspeed.init_distributed(dist_backend="gloo" if cpu else "nccl", verbose=False)
    except torch.distributed.DistNetworkError as error:
        address = f"{os.environ['MASTER_ADDR']} port {os.environ['MASTER_PORT']}"
        raise ConfigError(
            f"the ranks cannot meet at {address}: {error}; if another job holds the port, start "
            "with another one (deepspeed --master_port)"
        ) from None
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu") if cpu else torch.device("cuda", local_rank)
    if not cpu:
        torch.cuda.set_device(device)
    return Machine(device, torch.distributed.get_rank(), torch.distributed.get_world_size())


def build_engine(model: nn.Module, recipe: Recipe, ds_config: dict[str, Any], cpu: bool) -> Any:
    """Freezes, groups, and hands everything to DeepSpeed.

    Args:
        ds_config: from ``vlm.engine.ds_config.resolve``.

    Raises:
        ConfigError: nothing trains, the model lacks a forward mode, or DeepSpeed would train its
            parameters wrongly as they are stored.
    """
    import deepspeed  # not at the top: prepare_cpu must come first

    check_packed(model, ds_config)
    optim.freeze(model, recipe.model)
    _check_one_type(model, ds_config)
    check_modes(model, recipe)
    optimizer, scheduler = optim.optimizer(model, recipe, fused=not cpu)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=scheduler, config=ds_config
    )
    engine.grad_norms = GradNorms(engine)
    return engine


def _check_one_type(model: nn.Module, ds_config: dict[str, Any]) -> None:
    """DeepSpeed takes the type of every trained parameter from the first, unless it casts them."""
    if any(ds_config.get(name, {}).get("enabled") for name in ("bf16", "fp16")):
        return
    trained = {p.dtype: name for name, p in model.named_parameters() if p.requires_grad}
    if len(trained) > 1:
        found = ", ".join(f"{name} as {str(kind)[6:]}" for kind, name in trained.items())
        raise ConfigError(
            f"trained parameters are stored in several types ({found}); load the model in one, or "
            "set bf16.enabled to true in the DeepSpeed file"
        )
