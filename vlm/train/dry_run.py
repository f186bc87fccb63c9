"""What a run would do, without doing it: recipe, parameters, first batch, steps. No weights."""

import os
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerFast

from vlm.batch import Batch
from vlm.config import Recipe, to_yaml
from vlm.data.plan.plan import Position
from vlm.engine import optim
from vlm.errors import ConfigError
from vlm.train import chain, data
from vlm.train import model as models


def dry_run(recipe: Recipe, ds_config: dict[str, Any]) -> int:
    """Prints to stdout on rank 0."""
    if os.environ.get("RANK", "0") != "0":
        return 0
    console = Console(file=sys.stdout, width=100, highlight=False)
    console.print(to_yaml(recipe), markup=False, soft_wrap=True)
    if recipe.model.init_from is not None:
        console.print(_start(recipe.model.init_from), markup=False, soft_wrap=True)
    tokenizer = data.load_tokenizer(recipe)
    console.print(_parameter_table(recipe, tokenizer))
    source = data.open_source(recipe, tokenizer, training=True)
    data.open_source(recipe, tokenizer, training=False)  # it must be there too
    world = recipe.data.micro_batches // ds_config["gradient_accumulation_steps"]
    with closing(data.steps(source, recipe, 0, world, Position())) as steps:
        first = next(steps)
    console.print(_batch_table(first.batches[0]))
    samples = [sum(len(b.rows) for b in step) for step in source.plan.window(0)]
    console.print(
        f"steps {recipe.train.steps}, micro-batches a step {recipe.data.micro_batches}, ranks "
        f"{world}, accumulation {ds_config['gradient_accumulation_steps']}, samples a step "
        f"{min(samples)} to {max(samples)}, steps an epoch {_steps_per_epoch(source)}, ZeRO stage "
        f"{ds_config['zero_optimization']['stage']}"
    )
    return 0


def _start(init_from: Path) -> str:
    try:
        return f"starts from {chain.find_model(init_from)}"
    except ConfigError as error:  # the stage before may still be running
        return f"would not start yet: {error}"


def _parameter_table(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Table:
    with torch.device("meta"):
        model = models.build(recipe, len(tokenizer))
    table = Table("component", "parameters", "trains", "learning rate", title="Parameters")
    counts = optim.freeze(model, recipe.model)
    for count in counts:
        rate = recipe.optim.lr.model_dump()[count.name] if count.num_trainable else "frozen"
        table.add_row(count.name, f"{count.num_total:,}", f"{count.num_trainable:,}", str(rate))
    total, trains = sum(c.num_total for c in counts), sum(c.num_trainable for c in counts)
    table.add_row("all", f"{total:,}", f"{trains:,}", "")
    return table


def _batch_table(batch: Batch) -> Table:
    table = Table("tensor", "shape", "type", title="First micro-batch of rank 0")
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            table.add_row(name, str(tuple(value.shape)), str(value.dtype).removeprefix("torch."))
    table.add_row("keys", f"{batch.num_samples} samples", batch.kind)
    return table


def _steps_per_epoch(source: data.DataSource) -> str:
    """Exact for one window, else from the first one."""
    plan = source.plan
    steps = plan.steps_in_window(0) * plan.num_windows
    return str(steps) if plan.num_windows == 1 else f"about {steps}"
