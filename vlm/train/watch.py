"""All that looks at a run while it goes on, opened and closed together.

Not here: what is done about what it finds (``vlm.train.incidents``).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm.ckpt.state import TrainState
from vlm.data.load.loader import LoadedStep
from vlm.data.plan import plan
from vlm.engine.movement import MovementCheck
from vlm.engine.step import StepResult
from vlm.heartbeat import Heartbeat
from vlm.train.alerts import Alerts
from vlm.train.group_losses import GroupLosses
from vlm.train.health import Health, expected_first_loss
from vlm.train.meter import WINDOW, Meter, real_cost
from vlm.train.metrics import MetricLog, column
from vlm.train.mfu import peak_flops, step_flops, utilisation
from vlm.train.progress import Progress
from vlm.train.run import Run
from vlm.train.summary import RunSummary

SECONDS_PER_HOUR = 3600


@dataclass
class Watch:
    run: Run
    health: Health
    meter: Meter
    metrics: MetricLog
    alerts: Alerts
    progress: Progress
    movement: MovementCheck
    summary: RunSummary
    group_losses: GroupLosses
    heartbeat: Heartbeat
    #: of the last step that was logged
    last_loss: float | None = None

    def training(self, step: int, loaded: LoadedStep) -> None:
        """Tells a launcher that listens which shards this rank trains on now."""
        if self.heartbeat.heard:
            catalog, machine = self.run.train.catalog, self.run.machine
            mine = plan.assign([batch.cost for batch in loaded.plan], machine.world_size)
            rows = np.concatenate([loaded.plan[index].rows for index in mine[machine.rank]])
            self.heartbeat.beat("train", step, catalog.shards_of(rows))

    def before_save(self, state: TrainState) -> None:
        """Puts into ``state`` what is known here."""
        state.health = self.health.state_dict()
        state.elapsed_s += self.meter.lap()

    def restart(self, state: TrainState) -> None:
        """Goes on from an earlier state: what came after it is forgotten."""
        self.metrics.rewind(state.step)
        self.health = make_health(self.run, state)
        self.meter = Meter(self.run.train.plan.policy, self.run.machine.world_size)
        self.movement.resumed()

    def money(self, state: TrainState) -> dict[str, float | None]:
        """Time and money spent and left."""
        state.elapsed_s += self.meter.lap()
        left_s = self.meter.left_s(self.run.recipe.train.steps - state.step)
        price = self.run.recipe.log.gpu_price_per_hour
        per_s = None
        if price is not None:
            per_s = price * self.run.machine.world_size / SECONDS_PER_HOUR
        return {
            "elapsed_s": state.elapsed_s,
            "left_s": left_s,
            "cost": None if per_s is None else per_s * state.elapsed_s,
            "cost_left": None if per_s is None else per_s * left_s,
        }

    def log_step(
        self, state: TrainState, result: StepResult, loaded: LoadedStep, rates: dict[str, float]
    ) -> None:
        """Writes the row of a step, which is the last one. All ranks together."""
        self.last_loss = result.losses["loss"]
        losses = {column(name): value for name, value in result.losses.items()}
        if "fine" in result.losses and "coarse" in result.losses:
            losses["loss_ratio"] = result.losses["coarse"] / result.losses["fine"]
        looks = {name: value for name, value in result.measures.items() if not math.isnan(value)}
        if looks:
            looks["visual_ratio"] = looks["visual_std"] / looks["embedding_std"]
            self.alerts.tell(self.health.after_looks(state.step, looks))
        row = {
            "event": "train",
            "epoch": state.epoch,
            "samples_seen": state.samples_seen,
            "tokens_seen": state.tokens_seen,
            "wall_s": state.wall_s,
            "grad_norm": result.grad_norm,
            **{f"grad_norm_{name}": norm for name, norm in result.grad_norms.items()},
            **losses,
            **looks,
            **self.group_losses.take(),
            **self.meter.values(),
            **self.health.values(state.step),
            **self.money(state),
            **self.utilisation(state, loaded),
            **rates,
        }
        self.metrics.log(state.step, row)
        if self.meter.num_steps >= WINDOW:  # the first batches are always waited for
            self.alerts.tell(self.health.after_waiting(state.step, self.meter.data_wait_frac))

    def utilisation(self, state: TrainState, loaded: LoadedStep) -> dict[str, float | None]:
        """What the last step computed, at the speed of the steps around it."""
        run = self.run
        flops = step_flops(run, state.step - 1, loaded.batches)
        if flops is not None:
            flops *= self.meter.cost_per_s / real_cost(loaded.plan, run.train.plan.policy)
        return utilisation(flops, peak_flops(), run.machine.world_size)

    def summarise(self, state: TrainState, checkpoint: Path | None = None) -> None:
        """Writes what is known by now into the run's summary."""
        config = self.run.recipe.train
        values: dict[str, Any] = {
            "steps_done": state.step,
            "samples_seen": state.samples_seen,
            "tokens_seen": state.tokens_seen,
            "wall_s": state.wall_s,
            "elapsed_s": state.elapsed_s,
            "cost": self._cost(state),
            "final_train_loss": self.last_loss,
            "best_metric": config.best_metric,
            "best_value": state.best_loss,
            "best_step": state.best_step,
            "num_alerts": self.alerts.num_alerts,
            "num_incidents": self.alerts.num_incidents,
            "num_rollbacks": state.num_rollbacks,
            "steps_left_out": state.left_out,
        }
        if checkpoint is not None:
            values["checkpoint"] = str(checkpoint)
        self.summary.update(values)

    def _cost(self, state: TrainState) -> float | None:
        price = self.run.recipe.log.gpu_price_per_hour
        if price is None:
            return None
        return price * self.run.machine.world_size * state.elapsed_s / SECONDS_PER_HOUR


@contextmanager
def open_watch(
    run: Run, resumed: TrainState | None, movement: MovementCheck, summary: RunSummary
) -> Iterator[Watch]:
    recipe, state = run.recipe, resumed or TrainState()
    folder, resume_step = recipe.output_dir, None if resumed is None else resumed.step
    shown, groups = recipe.model_dump(mode="json"), GroupLosses(run.train.catalog.groups)
    with (
        MetricLog(folder, recipe.log, shown, resume_step, groups.source_columns) as metrics,
        Progress(recipe.train.steps, step=state.step) as progress,
    ):
        yield Watch(
            run=run,
            health=make_health(run, state),
            meter=Meter(run.train.plan.policy, run.machine.world_size),
            metrics=metrics,
            alerts=Alerts(folder, metrics.alert),
            progress=progress,
            movement=movement,
            summary=summary,
            group_losses=groups,
            heartbeat=Heartbeat(),
        )


def make_health(run: Run, state: TrainState) -> Health:
    recipe, engine = run.recipe, run.engine
    start = recipe.model.language.pretrained is None and recipe.model.init_from is None
    start = start and recipe.data.loss_on != "preference"  # which begins at ln 2
    return Health(
        recipe.health,
        clip=engine.gradient_clipping(),
        first_loss=expected_first_loss(len(run.tokenizer), start, recipe.health.first_loss_frac),
        scaled=engine.fp16_enabled(),
        state=state.health,
    )
