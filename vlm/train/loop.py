"""The training loop: `fit` says what happens in which order; each part lives elsewhere.

Not here: the step itself (``vlm.engine.step``), the order of samples (``vlm.data.plan``), files.
"""

import itertools
import json
import logging
import math
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlm import dist
from vlm.ckpt import load, save
from vlm.ckpt.state import TrainState
from vlm.config import COMPONENTS, Recipe, to_yaml
from vlm.data.loader import LoadedStep
from vlm.data.plan import Position
from vlm.engine.movement import MovementCheck
from vlm.engine.setup import Machine, build_engine
from vlm.engine.step import StepResult, train_step
from vlm.errors import ConfigError
from vlm.models import registry
from vlm.train import data
from vlm.train.meter import Meter
from vlm.train.metrics import MetricLog
from vlm.train.progress import Progress
from vlm.train.validate import validate

log = logging.getLogger(__name__)

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
    identity: dict[str, Any]

    @property
    def checkpoints(self) -> Path:
        return self.recipe.output_dir / "checkpoints"

    def steps(self, source: data.DataSource, position: Position) -> Generator[LoadedStep]:
        """This rank's share of the steps of ``source``."""
        rank, world_size = self.machine.rank, self.machine.world_size
        return data.steps(source, self.recipe, rank, world_size, position)


def fit(recipe: Recipe, ds_config: dict[str, Any], machine: Machine) -> None:
    """Trains to the recipe's last step, from the newest checkpoint if there is one."""
    make_folder(recipe.output_dir)
    run = build_run(recipe, ds_config, machine)
    resumed = load.resume(run.engine, run.checkpoints, run.identity)
    state = resumed or TrainState()
    if dist.is_main():
        save.replace_text(recipe.output_dir / "recipe.yaml", to_yaml(recipe))
        save.replace_text(recipe.output_dir / "ds_config.json", json.dumps(ds_config, indent=1))
    metrics = MetricLog(
        recipe.output_dir,
        recipe.log,
        recipe.model_dump(mode="json"),
        None if resumed is None else resumed.step,
    )
    with metrics, Progress(recipe.train.steps, step=state.step) as progress:
        if state.step < recipe.train.steps:
            _train(run, state, metrics, progress)
        else:
            log.info("all %d steps are done; nothing to train", state.step)


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"output_dir {path}: {error.strerror}; expected a folder that can be written"
        ) from None


def build_run(recipe: Recipe, ds_config: dict[str, Any], machine: Machine) -> Run:
    tokenizer = data.load_tokenizer(recipe)
    train = data.open_source(recipe, tokenizer, training=True)
    held_out = data.open_source(recipe, tokenizer, training=False)
    model = registry.build(recipe.model, len(tokenizer), recipe.seed)
    engine = build_engine(model, recipe, ds_config, cpu=machine.device.type == "cpu")
    identity = identify(recipe, ds_config, train.plan.plan_id, machine.world_size)
    return Run(recipe, machine, engine, tokenizer, train, held_out, identity)


def identify(
    recipe: Recipe, ds_config: dict[str, Any], plan_id: str, world_size: int
) -> dict[str, Any]:
    """What a run that goes on must share with the one it goes on from.

    Paths may differ, since data move (``plan_id`` knows what is in them), and so may what changes
    speed and memory alone.
    """
    part = {"gradient_checkpointing"}
    deepspeed = {name: ds_config.get(name) for name in SHARED_DEEPSPEED}
    stage = ds_config["zero_optimization"]["stage"]
    return {
        "plan_id": plan_id,
        "world_size": world_size,
        "steps": recipe.train.steps,
        "model": recipe.model.model_dump(
            mode="json", exclude={"tokenizer": True, "vision": part, "language": part}
        ),
        "optim": recipe.optim.model_dump(mode="json"),
        "augment": recipe.data.augment.model_dump(mode="json"),
        "deepspeed": {"version": version("deepspeed"), "zero_stage": stage, **deepspeed},
    }


def _train(run: Run, state: TrainState, metrics: MetricLog, progress: Progress) -> None:
    recipe, machine, last = run.recipe, run.machine, run.recipe.train.steps
    position = Position(state.window, state.window_step, state.step)
    movement = MovementCheck(run.engine.module, _trained(recipe), machine.device)
    meter = Meter(run.train.plan.policy, machine.world_size)
    run.engine.train()
    with closing(run.steps(run.train, position)) as steps:
        while state.step < last:
            started = time.perf_counter()
            loaded = next(steps)
            waited_s = time.perf_counter() - started
            rates = _learning_rates(run.engine)
            result = train_step(run.engine, loaded.batches)
            _check_finite(result, loaded, state)
            movement.after_step()
            _advance(state, loaded, meter.step(loaded.plan, waited_s))
            progress.update(
                state.step, loss=result.losses["loss"], samples_per_s=meter.samples_per_s
            )
            if _due(state.step, recipe.train.log_every, last):
                metrics.log(state.step, {**_train_row(state, result, meter), **rates})
            if _due(state.step, recipe.train.eval_every, last):
                metrics.log(state.step, {"event": "eval", **_evaluate(run)})
            if _due(state.step, recipe.train.checkpoint_every, last):
                _save(run, state)
            meter.pause()


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _trained(recipe: Recipe) -> set[str]:
    rates = recipe.optim.lr.model_dump()
    return {name for name in COMPONENTS if name not in recipe.model.freeze and rates[name] > 0}


def _advance(state: TrainState, loaded: LoadedStep, seconds: float) -> None:
    state.step += 1
    state.window, state.window_step = loaded.next.window, loaded.next.step
    state.epoch = loaded.epoch
    state.samples_seen += sum(len(batch.rows) for batch in loaded.plan)
    state.tokens_seen += sum(batch.num_tokens for batch in loaded.plan)
    state.wall_s += seconds


def _check_finite(result: StepResult, loaded: LoadedStep, state: TrainState) -> None:
    if not math.isfinite(result.losses["loss"]):
        keys = [key for batch in loaded.batches for key in batch.keys]
        raise FloatingPointError(
            f"step {state.step + 1}: the loss is {result.losses['loss']}; samples of rank "
            f"{dist.rank()}: {', '.join(keys)}"
        )
    if not result.applied:
        log.warning("step %d: gradients are not finite, the step was skipped", state.step + 1)


def _learning_rates(engine: Any) -> dict[str, float]:
    """Those of the next step. The schedule moves both groups of a component alike."""
    groups = engine.optimizer.param_groups  # vlm.engine.optim names them
    return {f"lr_{group['name'].removesuffix('_no_decay')}": group["lr"] for group in groups}


def _train_row(state: TrainState, result: StepResult, meter: Meter) -> dict[str, Any]:
    losses = {f"loss_{k}" if k != "loss" else k: v for k, v in result.losses.items()}
    if "fine" in result.losses and "coarse" in result.losses:
        losses["loss_ratio"] = result.losses["coarse"] / result.losses["fine"]
    return {
        "event": "train",
        "epoch": state.epoch,
        "samples_seen": state.samples_seen,
        "tokens_seen": state.tokens_seen,
        "wall_s": state.wall_s,
        "grad_norm": result.grad_norm,
        **losses,
        **meter.values(),
    }


def _evaluate(run: Run) -> dict[str, float]:
    with closing(run.steps(run.eval, Position())) as steps:
        return validate(run.engine, itertools.islice(steps, run.recipe.train.eval_steps))


def _save(run: Run, state: TrainState) -> None:
    save.save(
        run.engine,
        run.tokenizer,
        run.checkpoints,
        state,
        run.identity,
        run.recipe.train.keep_last,
    )
