"""What is done about a step that went wrong: left out, taken back, or the end of the run.

Decided from numbers that all ranks share (``vlm.train.health``), so all ranks do it together. Every
incident is recorded with the keys of the step's samples. Not here: running steps
(``vlm.train.loop``).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

from vlm.ckpt.state import TrainState
from vlm.config_model import LatentConfig, ModelConfig
from vlm.config_train import HealthConfig
from vlm.data.load.loader import LoadedStep
from vlm.engine import ladder
from vlm.engine.step import Pending, StepResult, read
from vlm.errors import HealthError
from vlm.train.health import Alert, Found, Verdict
from vlm.train.run import Run, resume
from vlm.train.watch import Watch


class Ran(NamedTuple):
    """A global step that was run, and may be read."""

    #: counted from 1
    step: int
    loaded: LoadedStep
    pending: Pending
    rates: dict[str, float]


def may_roll_back(config: HealthConfig) -> bool:
    return "rollback" in (config.on_nonfinite, config.on_spike)


def judge(run: Run, state: TrainState, watch: Watch, ran: Ran, *, log_it: bool) -> bool:
    """Reads a step and acts on it. True: the run has to go back to before it.

    Args:
        log_it: write its row, if it is the last one.

    Raises:
        HealthError: it has to stop.
    """
    result = read(ran.pending)
    norm = None if math.isnan(result.grad_norm) else result.grad_norm
    cross_entropy = cross_entropy_of(run.recipe.model, result.losses)
    found = Found(result.losses["loss"], cross_entropy, norm, result.applied)
    if result.applied:
        watch.group_losses.add(result.groups)
    verdict = watch.health.after_step(ran.step, found)
    watch.alerts.tell(verdict.alerts)
    if verdict.action != "none":
        _record(run, watch, ran, result, verdict)
    if verdict.action == "rollback" and state.num_rollbacks >= run.recipe.health.max_rollbacks:
        raise HealthError(
            f"step {ran.step}: {verdict.reason}, after {state.num_rollbacks} rollbacks; "
            + _advice(run)
        )
    if verdict.action == "stop":
        raise HealthError(f"step {ran.step}: {verdict.reason}; " + _advice(run))
    if verdict.action == "rollback":
        state.left_out = sorted({*state.left_out, ran.step - 1})
        return True
    if log_it and ran.step == state.step:
        watch.log_step(state, result, ran.loaded, ran.rates)
    return False


def cross_entropy_of(model: ModelConfig, losses: Mapping[str, float]) -> float | None:
    """Of predicting a token; None where a step predicts none."""
    if isinstance(model.connector, LatentConfig):  # fine and coarse are square errors
        return losses.get("caption")
    return losses.get("fine", losses.get("coarse", losses["loss"]))


def roll_back(run: Run, state: TrainState, watch: Watch) -> None:
    """Puts the newest checkpoint into the run and into ``state``, which keeps what it left out."""
    watch.heartbeat.beat("roll back", state.step)
    run.saver.finish()
    back = resume(run)
    assert back is not None, "a run that may go back saves before its first step"
    kept = {"left_out": state.left_out, "num_rollbacks": state.num_rollbacks + 1}
    elapsed_s = state.elapsed_s + watch.meter.lap()  # time is not taken back
    for field in dataclasses.fields(TrainState):
        setattr(state, field.name, vars(back)[field.name])
    vars(state).update(kept, elapsed_s=elapsed_s)
    watch.restart(state)


def out_of_memory(
    run: Run, state: TrainState, watch: Watch, loaded: LoadedStep, pending: Pending
) -> bool:
    """Whether a step was not applied since a rank found no memory; then it is to be run again.

    Raises:
        HealthError: nothing that needs less memory is left.
    """
    result = read(pending)
    if not result.num_lost:
        return False
    step, what = state.step + 1, f"{result.num_lost} micro-batches found no memory"
    if state.oom_rung == len(ladder.RUNGS):
        raise HealthError(
            f"step {step}: {what} with {ladder.RUNGS[-1]}; lower data.budget, model or frames, or "
            "use a DeepSpeed file that shards more (launch/estimate.py compares them)"
        )
    state.oom_rung += 1
    action = f"again with {ladder.RUNGS[state.oom_rung - 1]}, from now on"
    watch.alerts.tell([Alert(step, "out_of_memory", "warning", f"{what}; {action}")])
    watch.alerts.incident(step, what, action, keys=sample_keys(run, loaded))
    ladder.go_down(run.engine, state.oom_rung)
    schedule = run.engine.lr_scheduler  # back to the rates of this step
    schedule.last_epoch = state.step - 1
    schedule.step()
    return True


def _record(run: Run, watch: Watch, ran: Ran, result: StepResult, verdict: Verdict) -> None:
    watch.alerts.incident(
        ran.step,
        verdict.reason,
        verdict.action,
        loss=result.losses["loss"],
        grad_norm=result.grad_norm,
        keys=sample_keys(run, ran.loaded),
    )


def sample_keys(run: Run, loaded: LoadedStep) -> list[list[str]]:
    """Keys of a global step as planned, by micro-batch; those of all ranks."""
    return [run.train.catalog.keys(batch.rows) for batch in loaded.plan]


def _advice(run: Run) -> str:
    return (
        f"samples are in {run.recipe.output_dir}/incidents.jsonl; lower optim.lr or look at them, "
        "then start again with the same command: it goes on from the last checkpoint"
    )
