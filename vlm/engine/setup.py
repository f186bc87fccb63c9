"""From a model and a recipe to a DeepSpeed engine. The only place that calls ``initialize``."""

import os
import warnings
from typing import Any, NamedTuple

import torch
from torch import nn

from vlm.config import Recipe
from vlm.engine import optim
from vlm.engine.cpu import on_cpu, prepare_cpu, safe_loading
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
    """
    import deepspeed  # not at the top: prepare_cpu must come first

    optim.freeze(model, recipe.model)
    optimizer = optim.optimizer(model, recipe.optim, fused=not cpu)
    factor = optim.schedule(recipe.optim.schedule, recipe.train.steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=scheduler, config=ds_config
    )
    return engine
