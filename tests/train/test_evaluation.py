"""When a run stops early and which checkpoint is best, from series of held-out losses."""

import json
import math

import pytest

from tests.distributed import ranks
from tests.train import helpers, runs
from vlm.ckpt.state import TrainState
from vlm.config_train import TrainConfig
from vlm.errors import ConfigError
from vlm.train import evaluation, run
from vlm.train.metrics import read_rows
from vlm.train.preempt import Preemption


def stopped_after(values: list[float], patience: int, min_delta: float = 0.0) -> int | None:
    """Evaluations until a run stops, or None."""
    config = TrainConfig.model_validate(
        {"steps": 9, "early_stop": {"patience": patience, "min_delta": min_delta}}
    )
    state = TrainState()
    for count, value in enumerate(values, start=1):
        evaluation._note(state, config, value)
        if state.stopped_early:
            return count
    return None


def test_patience() -> None:
    assert stopped_after([3, 2, 2.5, 1.9, 1.95, 1.96], patience=2) == 6
    assert stopped_after([3, 2, 1, 1, 1], patience=3) is None
    assert stopped_after([3, 2, 1, 1, 1, 1], patience=3) == 6
    assert stopped_after([3, 2.99, 2.98, 2.97], patience=2, min_delta=0.1) == 3
    assert stopped_after([math.nan, math.nan], patience=2) == 2
    assert stopped_after([math.nan, 3.0, 2.0], patience=2) is None


def test_the_best_is_the_lowest_that_was_saved() -> None:
    state = TrainState()
    for step, value in ((1, 3.0), (2, None), (3, math.nan), (4, 2.0), (5, 2.5)):
        state.step = step
        evaluation.note_best(state, value)
    assert (state.best_step, state.best_loss) == (4, 2.0)


def test_a_run_that_stops_early_saves_and_stays_stopped() -> None:
    """Nothing improves by 100, so the second evaluation ends it."""
    early = "train.early_stop={patience: 1, min_delta: 100}"
    recipe = helpers.recipe(
        runs.new_folder(),
        early,
        "train.eval_every=1",
        "train.checkpoint_every=0",
        "train.eval_autoregressive=true",
        "train.best_metric=eval_loss_autoregressive",
        "log.gpu_price_per_hour=2",
    )
    (steps,) = ranks(1).run(runs.fit, recipe, 2)
    assert len(steps) == 2
    assert (runs.checkpoint(recipe, 2) / "COMPLETE").exists()
    rows = [r for r in read_rows(recipe.output_dir / "metrics.jsonl") if r["event"] == "eval"]
    summary = json.loads((recipe.output_dir / "run_summary.json").read_text())
    assert summary["status"] == "stopped early"
    assert summary["best_value"] == rows[-1]["eval_loss_autoregressive"]
    assert summary["cost"] == pytest.approx(2 * summary["elapsed_s"] / 3600)
    # the queries of inference are those of the fine pass, shifted: about the same loss
    assert rows[-1]["eval_loss_autoregressive"] == pytest.approx(
        rows[-1]["eval_loss_fine"], rel=0.2
    )
    assert ranks(1).run(runs.fit, recipe, 2) == [[]]


def test_zero_3_cannot_evaluate_frame_after_frame() -> None:
    recipe = helpers.recipe(runs.new_folder(), "train.eval_autoregressive=true")
    machine = run.Machine(runs.torch.device("cpu"), 0, 1)
    with pytest.raises(ConfigError, match=r"train\.eval_autoregressive.*ZeRO-3"):
        run.build_run(recipe, helpers.resolved(3, 1), machine, Preemption())
