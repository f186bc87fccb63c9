"""What a run is made of: data, model, engine and saver, as the recipe and DeepSpeed's file say.

Not here: what is done with them (``vlm.train.loop``).
"""

import hashlib
import random
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from vlm.ckpt import load
from vlm.ckpt.keep import Keep, finished_in
from vlm.ckpt.save import Saver
from vlm.ckpt.state import TrainState
from vlm.config import Recipe
from vlm.config_model import COMPONENTS
from vlm.data.load.loader import LoadedStep
from vlm.data.plan.plan import Plan, Position
from vlm.engine.setup import Machine, build_engine
from vlm.errors import ConfigError
from vlm.train import chain, data
from vlm.train import model as models
from vlm.train.preempt import Preemption
from vlm.train.reference import with_references

#: sections of the DeepSpeed file that change what is computed, not only where it lies
SHARED_DEEPSPEED = (
    "gradient_clipping",
    "bf16",
    "fp16",
    "torch_autocast",
    "data_types",
    "communication_data_type",
)


@dataclass
class Run:
    """All that a run is made of."""

    recipe: Recipe
    machine: Machine
    engine: Any
    tokenizer: Any
    train: data.DataSource
    eval: data.DataSource
    saver: Saver
    preemption: Preemption
    #: what a checkpoint says of the run
    about: dict[str, Any]

    @property
    def checkpoints(self) -> Path:
        return self.recipe.output_dir / "checkpoints"

    def steps(
        self, source: data.DataSource, position: Position, quarantine: Iterable[int] = ()
    ) -> Generator[LoadedStep]:
        """This rank's share of the steps of ``source``."""
        rank, world_size = self.machine.rank, self.machine.world_size
        return data.steps(source, self.recipe, rank, world_size, position, quarantine)


def resume(run: Run) -> TrainState | None:
    return load.resume(run.engine, run.checkpoints, run.about["identity"], run.recipe.seed)


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"output_dir {path}: {error.strerror}; expected a folder that can be written"
        ) from None


def build_run(
    recipe: Recipe, ds_config: dict[str, Any], machine: Machine, preemption: Preemption
) -> Run:
    tokenizer = data.load_tokenizer(recipe)
    train = data.open_source(recipe, tokenizer, training=True)
    held_out = data.open_source(recipe, tokenizer, training=False)
    # no part of ours draws from these, but a library may; torch's is seeded with the weights
    random.seed(recipe.seed)
    np.random.seed(recipe.seed % 2**32)
    model = models.build(recipe, len(tokenizer))
    # what goes on has weights of its own, and outlives the stage before
    if recipe.model.init_from is not None and not finished_in(recipe.output_dir / "checkpoints"):
        chain.load_weights(model, recipe.model.init_from)
    if ds_config["zero_optimization"]["stage"] == 3:
        _refuse_what_ranks_do_unequally(recipe)
    engine = build_engine(model, recipe, ds_config, cpu=machine.device.type == "cpu")
    identity = identify(recipe, ds_config, train.plan)
    if recipe.data.loss_on == "preference":
        compared = {
            "model": identity["model"],
            "init_from": str(recipe.model.init_from),
            "plans": [train.plan.plan_id, held_out.plan.plan_id],
        }
        known = with_references(engine, recipe, machine, tokenizer, compared)
        train, held_out = (
            source._replace(references=known[split])
            for split, source in (("train", train), ("eval", held_out))
        )
    config = recipe.train
    keep = Keep(config.keep_last, config.keep_every, config.keep_best)
    saver = Saver(engine, tokenizer, recipe.output_dir / "checkpoints", _local(recipe), keep)
    about = {
        "identity": identity,
        "recipe": recipe.model_dump(mode="json"),
        "ds_config": ds_config,
        "versions": {name: version(name) for name in ("deepspeed", "torch", "transformers")},
    }
    return Run(recipe, machine, engine, tokenizer, train, held_out, saver, preemption, about)


def _refuse_what_ranks_do_unequally(recipe: Recipe) -> None:
    """Under ZeRO-3 a rank that calls the model alone waits for the others' weights for ever."""
    config = recipe.train
    for key, asked in (
        ("eval_autoregressive", config.eval_autoregressive),
        ("eval_predictions", config.eval_predictions),
    ):
        if asked:
            raise ConfigError(
                f"train.{key}: found {asked}, but not all ranks call the model equally often for "
                "it, which ZeRO-3 cannot; leave it out and use launch/evaluate.py, or stage 2"
            )


def _local(recipe: Recipe) -> Path | None:
    """This run's own folder below the fast one: it is emptied before each save."""
    if recipe.train.local_dir is None:
        return None
    digest = hashlib.sha256(str(recipe.output_dir.resolve()).encode()).hexdigest()[:12]
    return recipe.train.local_dir / f"{recipe.name}-{digest}"


def identify(recipe: Recipe, ds_config: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """What a run that goes on must share with the one it goes on from.

    Paths may differ, since data move (``plan_id`` knows what is in them), and so may what changes
    speed and memory alone: the ranks, and the ZeRO stage.
    """
    parts: dict[str, Any] = {name: {"gradient_checkpointing"} for name in COMPONENTS}
    deepspeed = {name: ds_config.get(name) for name in SHARED_DEEPSPEED}
    return {
        "plan_id": plan.plan_id,
        "plan": plan.identity,  # so that a refusal says what is different
        "steps": recipe.train.steps,
        "model": recipe.model.model_dump(
            mode="json", exclude={"tokenizer": True, "init_from": True, **parts}
        ),
        "optim": recipe.optim.model_dump(mode="json"),
        "augment": recipe.data.augment.model_dump(mode="json"),
        "deepspeed": {"version": version("deepspeed"), **deepspeed},
    }
