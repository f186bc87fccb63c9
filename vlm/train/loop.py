"""The training loop: `fit` says what happens in which order; each part lives elsewhere.

Not here: the step itself (``vlm.engine.step``), the order of samples (``vlm.data.plan.plan``), what
is healthy (``vlm.train.health``), files.
"""

import itertools
import json
import logging
import math
import time
from collections import deque
from contextlib import closing
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from vlm import dist
from vlm.ckpt.files import replace_text
from vlm.ckpt.interval import best_interval_s
from vlm.ckpt.save import MODEL
from vlm.ckpt.state import TrainState
from vlm.config import Recipe, to_yaml
from vlm.data.load.loader import LoadedStep
from vlm.data.plan.plan import Position
from vlm.engine import ladder, optim, thaw
from vlm.engine.modes import forward_mode
from vlm.engine.movement import MovementCheck
from vlm.engine.setup import Machine
from vlm.engine.step import Pending, train_step
from vlm.errors import EXIT_PREEMPTED
from vlm.train import evaluation, incidents
from vlm.train.incidents import Ran
from vlm.train.preempt import Preemption
from vlm.train.run import Run, build_run, make_folder, resume
from vlm.train.summary import RunSummary
from vlm.train.watch import Watch, open_watch

log = logging.getLogger(__name__)


class Ending(Enum):
    """Why a run ends; its value is the status of ``run_summary.json``."""

    FINISHED = "finished"
    STOPPED_EARLY = "stopped early"
    PREEMPTED = "preempted"


def fit(recipe: Recipe, ds_config: dict[str, Any], machine: Machine, preemption: Preemption) -> int:
    """Trains to the recipe's last step, from the newest checkpoint if there is one.

    Returns:
        An exit code: 0, or 75 where a signal or time limit stopped it and all is saved.

    Raises:
        HealthError: training went wrong, and the recipe says to stop or nothing else is left.
    """
    make_folder(recipe.output_dir)
    about = {
        "name": recipe.name,
        "output_dir": str(recipe.output_dir),
        "num_ranks": machine.world_size,
        "steps_planned": recipe.train.steps,
    }
    with RunSummary(recipe.output_dir, about) as summary:
        run = build_run(recipe, ds_config, machine, preemption)
        movement = MovementCheck(run.engine.module, machine.device)
        resumed = resume(run)
        if dist.is_main():
            replace_text(recipe.output_dir / "recipe.yaml", to_yaml(recipe))
            replace_text(recipe.output_dir / "ds_config.json", json.dumps(ds_config, indent=1))
        state = resumed or TrainState()
        with run.saver, open_watch(run, resumed, movement, summary) as watch:
            ending = _fit(run, state, watch, fresh=resumed is None)
            watch.summarise(state)
        summary.status = ending.value
    return EXIT_PREEMPTED if ending is Ending.PREEMPTED else 0


def _fit(run: Run, state: TrainState, watch: Watch, *, fresh: bool) -> Ending:
    """``state`` ends up as that of the last step."""
    done = state.step == run.recipe.train.steps or state.stopped_early
    if done and not state.eval_due:
        log.info("all %d steps are done; nothing to train", state.step)
        return Ending.STOPPED_EARLY if state.stopped_early else Ending.FINISHED
    stopping = run.preemption.agreed(now=True) is not None
    if fresh and (stopping or incidents.may_roll_back(run.recipe.health)):
        _save(run, state, watch, must=True)  # the first step may be one to go back from
    if stopping:
        return Ending.PREEMPTED
    if not fresh:
        watch.movement.resumed()
    while (ending := _train(run, state, watch)) is None:
        incidents.roll_back(run, state, watch)
    return ending


def _train(run: Run, state: TrainState, watch: Watch) -> Ending | None:
    """Trains until the run ends; None where it has to go back to the last checkpoint."""
    recipe, config, last = run.recipe, run.recipe.train, run.recipe.train.steps
    position = Position(state.window, state.window_step, state.step)
    #: steps whose numbers were not read yet: one, so that nobody waits for the device
    unread: deque[Ran] = deque()
    if state.eval_due:  # the run was stopped before it could
        evaluation.note_best(state, evaluation.evaluate(run, state, watch))
        if run.preemption.reason:
            return Ending.PREEMPTED
    run.engine.train()
    ladder.go_down(run.engine, state.oom_rung)
    with closing(run.steps(run.train, position, state.quarantine)) as steps:
        while state.step < last:
            watch.heartbeat.beat("load", state.step + 1)
            started = time.perf_counter()
            loaded = next(steps)
            waited_s = time.perf_counter() - started
            watch.training(state.step + 1, loaded)
            rates = _learning_rates(run.engine)
            pending = _step(run, loaded, state, watch)
            _advance(state, loaded, watch.meter.step(loaded.plan, waited_s))
            if pending is not None:
                trained = optim.trained_at(recipe, state.step - 1) if pending.applied else ()
                watch.movement.after_step(trained)
                unread.append(Ran(state.step, loaded, pending, rates))
            logging_now = _due(state.step, config.log_every, last)
            evaluating = _due(state.step, config.eval_every, last)
            stopping = run.preemption.agreed() is not None
            saving = stopping or _due(state.step, config.checkpoint_every, last)
            now = logging_now or evaluating or saving
            while len(unread) > (0 if now else 1):
                if incidents.judge(run, state, watch, unread.popleft(), log_it=logging_now):
                    return None
            watch.progress.update(
                state.step, loss=watch.last_loss, samples_per_s=watch.meter.samples_per_s
            )
            state.eval_due = evaluating
            best = None
            if evaluating and not stopping:
                best = evaluation.evaluate(run, state, watch)
            stopping = stopping or run.preemption.reason is not None
            ending = stopping or state.stopped_early
            if ending or saving:
                evaluation.note_best(state, best)
                _save(run, state, watch, must=ending or state.step == last)
            if state.stopped_early:
                return Ending.STOPPED_EARLY
            if stopping:
                return Ending.PREEMPTED if state.step < last or state.eval_due else Ending.FINISHED
            watch.meter.pause()
    return Ending.FINISHED


def _step(run: Run, loaded: LoadedStep, state: TrainState, watch: Watch) -> Pending | None:
    """Runs the next global step as the recipe wants it; None where a rollback left it out."""
    recipe, every, step = run.recipe, run.recipe.train.agree_every, state.step
    for part in thaw.adapt(run.engine, recipe.model, step):
        log.info("step %d: %s begins to train", step, part)
    if step in state.left_out:
        run.engine.lr_scheduler.step()  # rates are named by the step of a run
        return None
    limit = watch.health.loss_limit if recipe.health.on_spike == "skip" else math.inf
    attempt = partial(
        train_step,
        run.engine,
        mode=forward_mode(recipe, step),
        measure_all=_due(step + 1, recipe.train.log_every, recipe.train.steps),
        agree=every > 0 and step % every == 0,
        loss_limit=limit,
        num_groups=len(run.train.catalog.groups),
    )
    while True:
        pending = attempt(ladder.cut(loaded.batches, state.oom_rung))
        if pending.applied or not incidents.out_of_memory(run, state, watch, loaded, pending):
            return pending


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _advance(state: TrainState, loaded: LoadedStep, seconds: float) -> None:
    if state.step not in state.left_out:
        state.samples_seen += sum(len(batch.rows) for batch in loaded.plan)
        state.tokens_seen += sum(batch.num_tokens for batch in loaded.plan)
    state.step += 1
    state.window, state.window_step = loaded.next.window, loaded.next.step
    state.epoch = loaded.epoch
    state.quarantine = list(loaded.quarantine)
    state.wall_s += seconds


def _learning_rates(engine: Any) -> dict[str, float]:
    """Those of the next step. The schedule moves both groups of a component alike."""
    groups = engine.optimizer.param_groups  # vlm.engine.optim names them
    return {f"lr_{group['name'].removesuffix('_no_decay')}": group["lr"] for group in groups}


def _save(run: Run, state: TrainState, watch: Watch, *, must: bool) -> None:
    # each rank has found bad what it has read; who reads what may be otherwise from here on
    found = dist.gather_objects(state.quarantine)
    state.quarantine = sorted(set(itertools.chain.from_iterable(found)))
    watch.before_save(state)
    # a copy may take far longer than a save, which a launcher measures by those before
    copies = must or run.saver.copying
    watch.heartbeat.beat("save and copy" if copies else "save", state.step)
    saved = run.saver.save(state, run.about, must=must)
    if saved is None:
        return
    row = {"checkpoint_stall_s": saved.stall_s, "checkpoint_gb": saved.num_bytes / 2**30}
    watch.metrics.log(state.step, {"event": "checkpoint", **row})
    watch.summarise(state, checkpoint=saved.path)
    _propose_interval(run.recipe, state, saved.stall_s)
    if watch.movement.unsaved and run.saver.finish():
        model: Path = saved.path / MODEL
        watch.movement.after_save(model, optim.trained_before(run.recipe, state.step))


def _propose_interval(recipe: Recipe, state: TrainState, stall_s: float) -> None:
    """Says how often to save where machines fail as often as the recipe says."""
    mtbf_hours, every = recipe.train.mtbf_hours, recipe.train.checkpoint_every
    if mtbf_hours is not None and state.step:
        interval_s = best_interval_s(stall_s, 3600 * mtbf_hours)
        steps = max(1, round(interval_s * state.step / state.wall_s))
        log.info(
            "a save takes %.1f s: at one failure in %g h the best interval is %.0f s, "
            "train.checkpoint_every=%d (it is %d)",
            *(stall_s, mtbf_hours, interval_s, steps, every),
        )
