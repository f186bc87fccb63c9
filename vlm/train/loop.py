"""The training loop: `fit` says what happens in which order; each part lives elsewhere.

Not here: the step itself (``vlm.engine.step``), the order of samples (``vlm.data.plan``), files.
"""

import hashlib
import itertools
import json
import logging
import math
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlm import dist
from vlm.ckpt import load
from vlm.ckpt.files import replace_text
from vlm.ckpt.interval import best_interval_s
from vlm.ckpt.keep import Keep
from vlm.ckpt.save import MODEL, Saver
from vlm.ckpt.state import TrainState
from vlm.config import Recipe, to_yaml
from vlm.config_model import COMPONENTS
from vlm.data.loader import LoadedStep
from vlm.data.plan import Plan, Position
from vlm.engine import optim, thaw
from vlm.engine.modes import forward_mode
from vlm.engine.movement import MovementCheck
from vlm.engine.setup import Machine, build_engine
from vlm.engine.step import Pending, StepResult, read, train_step
from vlm.errors import EXIT_PREEMPTED, ConfigError
from vlm.models import registry
from vlm.train import data
from vlm.train.meter import Meter
from vlm.train.metrics import MetricLog
from vlm.train.preempt import Preemption
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


def fit(recipe: Recipe, ds_config: dict[str, Any], machine: Machine, preemption: Preemption) -> int:
    """Trains to the recipe's last step, from the newest checkpoint if there is one.

    Returns:
        An exit code: 0, or 75 where a signal or time limit stopped it and all is saved.
    """
    make_folder(recipe.output_dir)
    run = build_run(recipe, ds_config, machine, preemption)
    movement = MovementCheck(run.engine.module, machine.device)
    resumed = resume(run)
    state = resumed or TrainState()
    if dist.is_main():
        replace_text(recipe.output_dir / "recipe.yaml", to_yaml(recipe))
        replace_text(recipe.output_dir / "ds_config.json", json.dumps(ds_config, indent=1))
    metrics = MetricLog(
        recipe.output_dir,
        recipe.log,
        recipe.model_dump(mode="json"),
        None if resumed is None else resumed.step,
    )
    with run.saver, metrics, Progress(recipe.train.steps, step=state.step) as progress:
        if state.step == recipe.train.steps and not state.eval_due:
            log.info("all %d steps are done; nothing to train", state.step)
        elif preemption.agreed(now=True):
            if resumed is None:
                _save(run, state, metrics, must=True)
        else:
            if resumed is not None:
                movement.resumed()
            _train(run, state, metrics, progress, movement)
    unfinished = state.step < recipe.train.steps or state.eval_due
    return EXIT_PREEMPTED if preemption.reason and unfinished else 0


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
    model = registry.build(recipe.model, len(tokenizer), recipe.seed)
    engine = build_engine(model, recipe, ds_config, cpu=machine.device.type == "cpu")
    config = recipe.train
    keep = Keep(config.keep_last, config.keep_every, config.keep_best)
    saver = Saver(engine, tokenizer, recipe.output_dir / "checkpoints", _local(recipe), keep)
    about = {
        "identity": identify(recipe, ds_config, train.plan),
        "recipe": recipe.model_dump(mode="json"),
        "ds_config": ds_config,
        "versions": {name: version(name) for name in ("deepspeed", "torch", "transformers")},
    }
    return Run(recipe, machine, engine, tokenizer, train, held_out, saver, preemption, about)


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
        "model": recipe.model.model_dump(mode="json", exclude={"tokenizer": True, **parts}),
        "optim": recipe.optim.model_dump(mode="json"),
        "augment": recipe.data.augment.model_dump(mode="json"),
        "deepspeed": {"version": version("deepspeed"), **deepspeed},
    }


def _train(
    run: Run, state: TrainState, metrics: MetricLog, progress: Progress, movement: MovementCheck
) -> None:
    recipe, machine, last = run.recipe, run.machine, run.recipe.train.steps
    position = Position(state.window, state.window_step, state.step)
    meter = Meter(run.train.plan.policy, machine.world_size)
    loss: float | None = None
    if state.eval_due:  # the run was stopped before it could
        _note_best(state, _evaluate(run, state, metrics))
        if run.preemption.reason:
            return
    run.engine.train()
    with closing(run.steps(run.train, position, state.quarantine)) as steps:
        while state.step < last:
            started = time.perf_counter()
            loaded = next(steps)
            waited_s = time.perf_counter() - started
            rates = _learning_rates(run.engine)
            pending = _step(run, loaded, state.step)
            movement.after_step(optim.trained_at(recipe, state.step))
            _advance(state, loaded, meter.step(loaded.plan, waited_s))
            if _due(state.step, recipe.train.log_every, last):
                result = read(pending)
                _check_finite(result, loaded, state)
                loss = result.losses["loss"]
                metrics.log(state.step, {**_train_row(state, result, meter), **rates})
            progress.update(state.step, loss=loss, samples_per_s=meter.samples_per_s)
            state.eval_due = _due(state.step, recipe.train.eval_every, last)
            evaluation = _evaluate(run, state, metrics) if state.eval_due else None
            stopping = run.preemption.agreed() is not None
            if stopping or _due(state.step, recipe.train.checkpoint_every, last):
                _check_finite(read(pending), loaded, state)
                _note_best(state, evaluation)
                path = _save(run, state, metrics, must=stopping or state.step == last)
                if path is not None and movement.unsaved:
                    run.saver.finish()
                    movement.after_save(path / MODEL, optim.trained_before(recipe, state.step))
            if stopping:
                return
            meter.pause()


def _step(run: Run, loaded: LoadedStep, step: int) -> Pending:
    """Runs the global step with this index, as the recipe wants it."""
    recipe, every = run.recipe, run.recipe.train.agree_every
    for part in thaw.adapt(run.engine, recipe.model, step):
        log.info("step %d: %s begins to train", step, part)
    mode, agree = forward_mode(recipe, step), every > 0 and step % every == 0
    measure = _due(step + 1, recipe.train.log_every, recipe.train.steps)
    pending = train_step(run.engine, loaded.batches, mode=mode, measure_all=measure, agree=agree)
    if not pending.applied:
        log.warning("step %d: gradients are not finite, the step was skipped", step + 1)
    return pending


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _advance(state: TrainState, loaded: LoadedStep, seconds: float) -> None:
    state.step += 1
    state.window, state.window_step = loaded.next.window, loaded.next.step
    state.epoch = loaded.epoch
    state.quarantine = list(loaded.quarantine)
    state.samples_seen += sum(len(batch.rows) for batch in loaded.plan)
    state.tokens_seen += sum(batch.num_tokens for batch in loaded.plan)
    state.wall_s += seconds


def _check_finite(result: StepResult, loaded: LoadedStep, state: TrainState) -> None:
    if not math.isfinite(result.losses["loss"]):
        keys = [key for batch in loaded.batches for key in batch.keys]
        raise FloatingPointError(
            f"step {state.step}: the loss is {result.losses['loss']}; samples of rank "
            f"{dist.rank()}: {', '.join(keys)}"
        )


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


def _evaluate(run: Run, state: TrainState, metrics: MetricLog) -> dict[str, float] | None:
    """None where all ranks have agreed to stop; it is still due then."""
    with closing(run.steps(run.eval, Position())) as steps:
        some = itertools.islice(steps, run.recipe.train.eval_steps)
        found = validate(run.engine, _until_stopped(some, run.preemption))
    if run.preemption.reason:
        return None
    state.eval_due = False
    metrics.log(state.step, {"event": "eval", **found})
    return found


def _until_stopped(steps: Iterable[LoadedStep], preemption: Preemption) -> Iterator[LoadedStep]:
    for loaded in steps:
        yield loaded
        if preemption.agreed():
            return


def _note_best(state: TrainState, evaluation: dict[str, float] | None) -> None:
    """Only a step that is saved can be the best."""
    if evaluation is None or not math.isfinite(evaluation["eval_loss"]):
        return
    if state.best_loss is None or evaluation["eval_loss"] < state.best_loss:
        state.best_loss, state.best_step = evaluation["eval_loss"], state.step


def _save(run: Run, state: TrainState, metrics: MetricLog, *, must: bool) -> Path | None:
    """Where the checkpoint is, or will be once it is copied."""
    # each rank has found bad what it has read; who reads what may be otherwise from here on
    found = dist.gather_objects(state.quarantine)
    state.quarantine = sorted(set(itertools.chain.from_iterable(found)))
    saved = run.saver.save(state, run.about, must=must)
    if saved is None:
        return None
    row = {"checkpoint_stall_s": saved.stall_s, "checkpoint_gb": saved.num_bytes / 2**30}
    metrics.log(state.step, {"event": "checkpoint", **row})
    mtbf_hours, every = run.recipe.train.mtbf_hours, run.recipe.train.checkpoint_every
    if mtbf_hours is not None and state.step:
        interval_s = best_interval_s(saved.stall_s, 3600 * mtbf_hours)
        steps = max(1, round(interval_s * state.step / state.wall_s))
        log.info(
            "a save takes %.1f s: at one failure in %g h the best interval is %.0f s, "
            "train.checkpoint_every=%d (it is %d)",
            *(saved.stall_s, mtbf_hours, interval_s, steps, every),
        )
    return saved.path
