"""Evaluation in training: held-out losses, which checkpoint is best, and when to stop early.

Not here: the losses themselves (``vlm.train.validate``).
"""

import itertools
import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import closing

from vlm.ckpt.state import TrainState
from vlm.config_train import TrainConfig
from vlm.data.load.loader import LoadedStep
from vlm.data.plan.plan import Position
from vlm.engine.modes import only_mode
from vlm.train import held_out_looks, predictions
from vlm.train.preempt import Preemption
from vlm.train.run import Run
from vlm.train.validate import validate
from vlm.train.watch import Watch

log = logging.getLogger(__name__)


def evaluate(run: Run, state: TrainState, watch: Watch) -> float | None:
    """Logs held-out losses, judges them, and finds whether it is time to stop early.

    Returns:
        What the best checkpoint goes by; None where all ranks have agreed to stop: it is still due.
    """
    config = run.recipe.train
    with closing(run.steps(run.eval, Position())) as steps:
        some = _until_stopped(itertools.islice(steps, config.eval_steps), run.preemption)
        some = _heard(some, state.step, watch)
        found = validate(
            run.engine,
            some,
            mode=only_mode(run.recipe),
            autoregressive=config.eval_autoregressive,
        )
    if run.preemption.reason:
        return None
    state.eval_due = False
    watch.metrics.log(state.step, {"event": "eval", **found})
    watch.alerts.tell(watch.health.after_eval(state.step, found["eval_loss"]))
    if config.eval_predictions and run.machine.rank == 0:
        predictions.write(run, state.step)
    held_out_looks.draw(run, state.step)
    value = found[config.best_metric]
    _note(state, config, value)
    return value


def _until_stopped(steps: Iterable[LoadedStep], preemption: Preemption) -> Iterator[LoadedStep]:
    for loaded in steps:
        yield loaded
        if preemption.agreed():
            return


def _heard(steps: Iterable[LoadedStep], step: int, watch: Watch) -> Iterator[LoadedStep]:
    for loaded in steps:
        watch.heartbeat.beat("evaluate", step)
        yield loaded


def _note(state: TrainState, config: TrainConfig, value: float) -> None:
    stop = config.early_stop
    delta = 0.0 if stop is None else stop.min_delta
    if math.isfinite(value) and (state.lowest_loss is None or value < state.lowest_loss - delta):
        state.lowest_loss, state.num_stale_evals = value, 0
    else:
        state.num_stale_evals += 1
    if stop is not None and state.num_stale_evals >= stop.patience:
        state.stopped_early = True
        log.info(
            "stopping early: %s is %.4g; %d evaluations were not better than the best, %s",
            *(config.best_metric, value, state.num_stale_evals, state.lowest_loss),
        )


def note_best(state: TrainState, value: float | None) -> None:
    """Only a step that is saved can be the best."""
    if value is None or not math.isfinite(value):
        return
    if state.best_loss is None or value < state.best_loss:
        state.best_loss, state.best_step = value, state.step
