"""The training loop: `fit` says what happens in which order; each part lives elsewhere.

Not here: the step itself (``vlm.engine.step``), the order of samples (``vlm.data.plan``), files.
"""

import logging
import math
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlm import dist
from vlm.ckpt import load, save
from vlm.ckpt.state import TrainState
from vlm.config import Recipe, to_yaml
from vlm.data.loader import LoadedStep
from vlm.data.plan import Position
from vlm.engine import movement
from vlm.engine.setup import Machine, build_engine
from vlm.engine.step import StepResult, train_step
from vlm.models import registry
from vlm.train import data
from vlm.train.meter import Meter
from vlm.train.metrics import MetricLog
from vlm.train.progress import Progress
from vlm.train.validate import validate

log = logging.getLogger(__name__)


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


def fit(recipe: Recipe, ds_config: dict[str, Any], machine: Machine) -> None:
    """Trains to the recipe's last step, from the newest checkpoint if there is one."""
    run = build_run(recipe, ds_config, machine)
    state = load.resume(run.engine, run.checkpoints, run.identity)
    metrics = MetricLog(
        recipe.output_dir,
        recipe.log,
        recipe.model_dump(mode="json"),
        None if state is None else state.step,
    )
    state = state or TrainState()
    if dist.is_main():
        (recipe.output_dir / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8")
        save.write_json(recipe.output_dir / "ds_config.json", ds_config)
    with metrics, Progress(recipe.train.steps, step=state.step) as progress:
        if state.step < recipe.train.steps:
            _train(run, state, metrics, progress)
        else:
            log.info("all %d steps are done; nothing to train", state.step)


def build_run(recipe: Recipe, ds_config: dict[str, Any], machine: Machine) -> Run:
    tokenizer = data.load_tokenizer(recipe)
    train = data.open_source(recipe, tokenizer, recipe.data.train, training=True)
    held_out = data.open_source(recipe, tokenizer, recipe.data.eval, training=False)
    model = registry.build(recipe.model, len(tokenizer), recipe.seed)
    engine = build_engine(model, recipe, ds_config, cpu=machine.device.type == "cpu")
    identity = {
        "plan_id": train.plan.plan_id,
        "world_size": machine.world_size,
        "zero_stage": engine.zero_optimization_stage(),
        "steps": recipe.train.steps,
        "model": recipe.model.model_dump(mode="json"),
        "deepspeed": version("deepspeed"),
    }
    return Run(recipe, machine, engine, tokenizer, train, held_out, identity)


def _train(run: Run, state: TrainState, metrics: MetricLog, progress: Progress) -> None:
    recipe, machine, options = run.recipe, run.machine, run.recipe.train
    position = Position(state.window, state.window_step)
    loader = data.loader(run.train, recipe, machine.rank, machine.world_size, position)
    meter = Meter(run.train.plan.policy, machine.world_size)
    first = movement.checksums(run.engine.module) if state.step == 0 else None
    steps = iter(loader)
    try:
        while state.step < options.steps:
            started = time.perf_counter()
            loaded = next(steps)
            waited_s = time.perf_counter() - started
            result = train_step(run.engine, loaded.batches)
            _check_finite(result, loaded, state)
            if first is not None:
                after = movement.checksums(run.engine.module)
                movement.check_moved(first, after, recipe.model.freeze, machine.device)
                first = None
            _advance(state, loaded, meter.step(loaded.plan, waited_s))
            progress.update(
                state.step, loss=result.losses["loss"], samples_per_s=meter.samples_per_s
            )
            is_last = state.step == options.steps
            if is_last or state.step % options.log_every == 0:
                metrics.log(state.step, _train_row(run, state, result, meter))
            if is_last or _due(state.step, options.eval_every):
                metrics.log(state.step, {"event": "eval", **_evaluate(run)})
            if is_last or _due(state.step, options.checkpoint_every):
                save.save(
                    run.engine, run.tokenizer, run.checkpoints, state, run.identity,
                    options.keep_last,
                )  # fmt: skip
            meter.pause()
    finally:
        steps.close()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


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


def _train_row(run: Run, state: TrainState, result: StepResult, meter: Meter) -> dict[str, Any]:
    losses = {f"loss_{k}" if k != "loss" else k: v for k, v in result.losses.items()}
    if "fine" in result.losses and "coarse" in result.losses:
        losses["loss_ratio"] = result.losses["coarse"] / result.losses["fine"]
    # group names are set by vlm.engine.optim; the schedule moves all groups alike
    rates = {f"lr_{g['name']}": g["lr"] for g in run.engine.optimizer.param_groups}
    return {
        "event": "train",
        "epoch": state.epoch,
        "samples_seen": state.samples_seen,
        "tokens_seen": state.tokens_seen,
        "wall_s": state.wall_s,
        "grad_norm": result.grad_norm,
        **losses,
        **{name: lr for name, lr in rates.items() if not name.endswith("_no_decay")},
        **meter.values(),
    }


def _evaluate(run: Run) -> dict[str, float]:
    position = Position()
    loader = data.loader(run.eval, run.recipe, run.machine.rank, run.machine.world_size, position)
    return validate(run.engine, loader, run.recipe.train.eval_steps)
