"""Steps that go wrong in whole runs: left out, taken back, the end. One rank; every rank decides
from the same numbers (tests/engine/test_grad_norms.py leaves steps out on two)."""

import itertools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import ranks
from tests.train import helpers, runs
from vlm.config import Recipe
from vlm.engine import ladder
from vlm.errors import HealthError
from vlm.models.foveated import FoveatedModel
from vlm.train import data
from vlm.train.incidents import cross_entropy_of
from vlm.train.metrics import read_rows

STEPS = 8
BAD = 5
HEALTH = ("health.warmup_steps=2", "health.spike_factor=1.5")
STEADY = ("model.vision.config.drop_path_rate=0", "model.language.config.attention_dropout=0")


@contextmanager
def spoiled(kind: str, keys: list[str] | None) -> Iterator[None]:
    """The loss of the step with these samples is a hundred times too large, or its gradient nan."""
    train_step = runs.train_step

    def run(engine: Any, batches: Any, **options: Any) -> Any:
        if sorted(k for b in batches for k in b.keys) != sorted(keys or ()):
            return train_step(engine, batches, **options)
        factor = 100.0 if kind == "spike" else math.nan
        forward = engine.module.language.token_losses
        with mock.patch.object(
            engine.module.language, "token_losses", lambda *args: forward(*args) * factor
        ):
            return train_step(engine, batches, **options)

    with mock.patch.object(runs, "train_step", run):
        yield


def train(recipe: Recipe, kind: str, bad: int | None) -> list[tuple[int, float, bool]] | str:
    """Trains with the samples of step ``bad`` (from 1) spoiled."""
    source = data.open_source(recipe, data.load_tokenizer(recipe), training=True)
    keys = None
    if bad is not None:
        planned = next(itertools.islice(source.plan.steps(), bad - 1, None))
        keys = [key for batch in planned.step for key in source.catalog.keys(batch.rows)]
    with spoiled(kind, keys):
        try:
            runs.fit(recipe, 2)
        except HealthError as error:
            return str(error)
    return ""


def fit(kind: str, bad: int | None, *overrides: str) -> tuple[Recipe, str]:
    recipe = helpers.recipe(
        runs.new_folder(),
        f"train.steps={STEPS}",
        "train.checkpoint_every=2",
        "train.eval_every=0",
        "train.keep_last=9",
        *HEALTH,
        *STEADY,
        *overrides,
    )
    (said,) = ranks(1).run(train, recipe, kind, bad)
    return recipe, said


def losses(recipe: Recipe) -> dict[int, float]:
    rows = read_rows(recipe.output_dir / "metrics.jsonl")
    steps = [row["step"] for row in rows if row["event"] == "train"]
    assert steps == sorted(set(steps))
    return {row["step"]: row["loss"] for row in rows if row["event"] == "train"}


def lines(recipe: Recipe, name: str) -> list[dict]:
    return [json.loads(line) for line in (recipe.output_dir / name).read_text().splitlines()]


def weights(recipe: Recipe) -> dict[str, torch.Tensor]:
    return load_file(runs.checkpoint(recipe, STEPS) / "model" / "model.safetensors")


@pytest.mark.parametrize("kind", ["spike", "nonfinite"])
def test_a_rollback_ends_where_a_skip_does(kind: str) -> None:
    """Both leave one step out; one notices before the update, the other takes it back."""
    skipped, said = fit(kind, BAD, f"health.on_{kind}=skip")
    assert said == ""
    back, said = fit(kind, BAD, f"health.on_{kind}=rollback")
    assert said == ""
    one, other = losses(skipped), losses(back)
    assert set(one) == set(range(1, STEPS + 1))
    assert set(other) == set(one) - {BAD}
    for step in other:
        assert one[step] == other[step], step
    for name, tensor in weights(skipped).items():
        assert torch.equal(tensor, weights(back)[name]), name
    for recipe, action in ((skipped, "skip"), (back, "rollback")):
        (incident,) = lines(recipe, "incidents.jsonl")
        assert (incident["step"], incident["action"]) == (BAD, action)
        assert len(incident["keys"]) == helpers.MICRO_BATCHES
        checks = [alert["check"] for alert in lines(recipe, "alerts.jsonl")]
        assert {"spike": "loss_spike", "nonfinite": "nonfinite"}[kind] in checks
        summary = json.loads((recipe.output_dir / "run_summary.json").read_text())
        assert summary["status"] == "finished"
    assert summary["num_rollbacks"] == 1 and summary["steps_left_out"] == [BAD - 1]


def test_a_warning_trains_on() -> None:
    warned, said = fit("spike", BAD, "health.on_spike=warn")
    assert said == ""
    assert losses(warned)[BAD] > 50
    (incident,) = lines(warned, "incidents.jsonl")
    assert incident["action"] == "warn"


def test_rollbacks_come_to_an_end() -> None:
    """The very first step is bad, whatever its samples: nothing before it helps."""
    rates = [f"optim.lr.{name}=1e30" for name in ("vision", "connector", "language")]
    recipe, said = fit("none", None, *rates, "health.on_nonfinite=rollback")
    assert "after 3 rollbacks" in said
    assert len(lines(recipe, "incidents.jsonl")) == 4


def test_stop() -> None:
    recipe, said = fit("spike", BAD, "health.on_spike=stop")
    assert said.startswith(f"step {BAD}: the loss is ")
    assert "incidents.jsonl" in said
    summary = json.loads((recipe.output_dir / "run_summary.json").read_text())
    assert summary["status"] == "failed" and "HealthError" in summary["error"]


def starved(recipe: Recipe, most: int) -> list[runs.Step] | str:
    """Rank 1 finds no memory for micro-batches of more than so many samples; for every other
    call, if that is 0: what stands in has to fit."""
    forward, calls = FoveatedModel.forward, itertools.count()

    def limited(model: Any, batch: Any, *args: Any, **options: Any) -> Any:
        too_many = batch.num_samples > most if most else next(calls) % 2 == 0
        if model.training and runs.machine().rank == 1 and too_many:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, batch, *args, **options)

    with mock.patch.object(FoveatedModel, "forward", limited):
        try:
            return runs.fit(recipe, 2)
        except HealthError as error:
            return str(error)


def test_out_of_memory_on_one_rank_all_go_down_together() -> None:
    """Every step is trained on, and comes to the same but for the order of sums."""
    recipes = [helpers.recipe(runs.new_folder(), *STEADY, "optim.eps=1e-3") for _ in range(2)]
    ranks(2).run(runs.fit, recipes[0], 2)
    ranks(2).run(starved, recipes[1], 1)
    plain, short = (losses(recipe) for recipe in recipes)
    assert short == pytest.approx(plain, rel=1e-3)
    rates = [
        [row["lr_language"] for row in read_rows(r.output_dir / "metrics.jsonl")] for r in recipes
    ]
    assert rates[0] == rates[1]
    found = lines(recipes[1], "incidents.jsonl")
    assert found and all("found no memory" in row["what"] for row in found)
    actions = [row["action"].split(",")[0].removeprefix("again with ") for row in found]
    assert actions == list(ladder.RUNGS[: len(found)])


def test_the_ladder_ends() -> None:
    recipe = helpers.recipe(runs.new_folder(), *STEADY)
    for said in ranks(2).run(starved, recipe, 0):
        assert said.startswith("step 1: ")
        assert "found no memory with gradient checkpointing" in said
    assert len(lines(recipe, "incidents.jsonl")) == len(ladder.RUNGS)


def test_square_errors_of_latents_are_no_cross_entropy(tmp_path: Path) -> None:
    """Else the first step of a model that starts at random would be called wrong."""
    losses = {"loss": 2.2, "fine": 1.0, "coarse": 1.1, "caption": 5.6}
    foveated = helpers.recipe(tmp_path).model
    latent = helpers.recipe(tmp_path, "model.family=foveated_latent", "data.augment={}").model
    assert cross_entropy_of(foveated, losses) == 1.0
    assert cross_entropy_of(latent, losses) == 5.6
    del losses["caption"]  # a mode that predicts no token
    assert cross_entropy_of(latent, losses) is None
    assert cross_entropy_of(foveated, {"loss": 3.0}) == 3.0
