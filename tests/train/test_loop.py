import csv
import json
import random
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.distributed import ranks
from tests.train import helpers, runs
from vlm import config
from vlm.ckpt.state import rng_state
from vlm.config import Recipe
from vlm.data.plan.plan import Position
from vlm.engine import optim
from vlm.errors import ConfigError
from vlm.models import registry
from vlm.train import data, run
from vlm.train.metrics import COLUMNS, read_rows
from vlm.train.preempt import Preemption
from vlm.train.run import make_folder

Rows = list[dict]


def rows(event: str, stage: int = 2) -> Rows:
    path = runs.whole(stage).recipe.output_dir / "metrics.jsonl"
    return [row for row in read_rows(path) if row["event"] == event]


def column(name: str) -> list:
    return [row[name] for row in rows("train")]


def test_a_run_folder_is_what_the_documentation_says() -> None:
    run = runs.whole(2)
    folder = run.recipe.output_dir
    assert sorted(p.name for p in folder.iterdir()) == runs.FOLDER
    assert config.load(folder / "recipe.yaml") == run.recipe
    resolved = json.loads((folder / "ds_config.json").read_text())
    assert resolved == helpers.resolved(2, world_size=2)
    with (folder / "metrics.csv").open(newline="") as file:
        assert next(csv.reader(file)) == [*COLUMNS, "loss_source_train"]


def test_every_step_has_a_row_and_the_counters_grow() -> None:
    steps = range(1, helpers.STEPS + 1)
    assert column("step") == list(steps)
    for name in ("samples_seen", "tokens_seen", "wall_s"):
        assert all(a < b for a, b in zip(column(name), column(name)[1:], strict=False)), name
    assert column("epoch") == sorted(column("epoch"))
    assert column("epoch")[0] == 0 and column("epoch")[-1] >= 1
    assert [row["step"] for row in rows("eval")] == [3, 6]


def test_rows_hold_what_the_step_returned() -> None:
    for rank in runs.whole(2).steps:
        for row, step in zip(rows("train"), rank, strict=True):
            assert row["loss"] == step.result.losses["loss"]
            assert row["loss_fine"] == step.result.losses["fine"]
            assert row["loss_coarse"] == step.result.losses["coarse"]
            assert row["loss_ratio"] == row["loss_coarse"] / row["loss_fine"]
            assert row["grad_norm"] == step.result.grad_norm > 0
            for name, norm in step.result.grad_norms.items():
                assert row[f"grad_norm_{name}"] == norm > 0


def test_losses_of_kinds_and_sources_add_up() -> None:
    """All samples are of one source; what is told apart is the fine pass."""
    for row in rows("train"):
        assert row["loss_source_train"] == pytest.approx(row["loss_fine"], rel=1e-6)
        kinds = [row[name] for name in ("loss_text", "loss_image", "loss_video")]
        known = [loss for loss in kinds if loss is not None]
        assert min(known) <= row["loss_fine"] <= max(known)
        assert row["tflops_per_s"] > 0 and row["mfu_frac"] is None
        assert row["frames_per_s"] > 0 and row["left_s"] >= 0
    assert any(row["loss_text"] is not None for row in rows("train"))


def test_it_learns() -> None:
    assert column("loss")[-1] < 0.8 * column("loss")[0]
    first, last = rows("eval")
    assert last["eval_loss"] < first["eval_loss"]


def test_text_is_mixed_in_as_the_recipe_says() -> None:
    source = open_source(runs.whole(2).recipe, training=True)
    texts = [key for key, kind in kinds(source).items() if kind == 0]
    seen = [k for rank in runs.whole(2).steps for step in rank for keys in step.keys for k in keys]
    found = sum(key in texts for key in seen) / len(seen)
    assert found == pytest.approx(helpers.TEXT_FRAC, abs=0.05)
    assert column("text_frac")[-1] == pytest.approx(found)
    assert column("samples_seen")[-1] == len(seen)


def open_source(recipe: Recipe, training: bool) -> data.DataSource:
    return data.open_source(recipe, data.load_tokenizer(recipe), training=training)


def kinds(source: data.DataSource) -> dict[str, int]:
    every = source.catalog.keys(range(source.catalog.num_samples))
    return dict(zip(every, source.catalog.kind.tolist(), strict=True))


def test_shares_and_speeds_are_sane() -> None:
    for row in rows("train"):
        assert 0 < row["fill_frac"] <= 1
        assert 1 <= row["balance"] < 2
        assert 0 <= row["data_wait_frac"] < 1
        assert row["tokens_per_s"] > row["samples_per_s"] > 0


def test_each_component_follows_its_own_rate() -> None:
    recipe = runs.whole(2).recipe
    peaks = {"vision": 1e-3, "connector": 2e-3, "language": 3e-3}
    for name, peak in peaks.items():
        rate = optim.schedule(recipe.optim.schedule, helpers.STEPS, peak)
        expected = [rate(step) for step in range(helpers.STEPS)]
        assert column(f"lr_{name}") == pytest.approx(expected)


def test_the_held_out_loss_is_that_of_the_saved_model() -> None:
    recipe = runs.whole(3).recipe
    model = registry.load(runs.checkpoint(recipe, helpers.STEPS) / "model").eval()
    steps = data.steps(open_source(recipe, training=False), recipe, 0, 1, Position())
    batches = next(steps).batches
    steps.close()
    with torch.no_grad():
        outputs = [model(batch, measure_all=True) for batch in batches]
    tokens = sum(batch.num_loss_tokens for batch in batches)
    row = rows("eval", stage=3)[-1]
    assert row["eval_loss"] == pytest.approx(sum(float(o.loss_sum) for o in outputs) / tokens)
    fine = sum(float(o.parts["fine"]) for o in outputs) / tokens
    assert row["eval_loss_fine"] == pytest.approx(fine)


def test_looks_are_those_of_all_ranks_in_any_stage() -> None:
    """Drop path makes them random, but for what depends on weights and text alone."""
    recipe = runs.whole(2).recipe
    source = open_source(recipe, training=True)
    model = registry.build(recipe.model, len(source.collator.tokenizer), recipe.seed)
    total: Counter[tuple[str, int]] = Counter()
    with torch.no_grad(), closing(data.steps(source, recipe, 0, 1, Position())) as steps:
        for batch in next(steps).batches:
            for name, pair in model(batch, measure_all=True).measures.items():
                total.update({(name, i): float(value) for i, value in enumerate(pair)})
    two, three = (rows("train", stage)[0] for stage in (2, 3))
    names = {name for name, _ in total}
    assert {n: two[n] for n in names} == pytest.approx({n: three[n] for n in names}, rel=1e-3)
    for name in ("attention_entropy_max", "q_static_std", "embedding_std"):
        assert two[name] == pytest.approx(total[name, 0] / total[name, 1], rel=1e-4)
    assert two["visual_ratio"] == pytest.approx(two["visual_std"] / two["embedding_std"])


def test_a_run_without_a_fine_pass_has_no_looks_of_one() -> None:
    recipe = helpers.recipe(
        runs.new_folder(), "train.modes={coarse_only: 1}", "train.steps=1", "train.eval_pictures=0"
    )
    ranks(1).run(runs.fit, recipe, 2)
    row = read_rows(recipe.output_dir / "metrics.jsonl")[0]
    looks = COLUMNS[COLUMNS.index("attention_entropy") : COLUMNS.index("visual_ratio") + 1]
    unknown = {name for name in looks if row[name] is None}
    assert unknown == {"attention_entropy", "query_similarity", "look_change"}
    assert 0 < row["attention_entropy_static"] <= row["attention_entropy_max"]


def test_stages_train_alike() -> None:
    """Only the order of sums differs between ZeRO-2 and ZeRO-3; it grows with every step."""
    losses = [[row["loss"] for row in rows("train", stage)] for stage in (2, 3)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_finished_run_trains_nothing() -> None:
    run = runs.whole(2)
    before = (run.recipe.output_dir / "metrics.jsonl").read_bytes()
    assert ranks(2).run(runs.fit, run.recipe, 2) == [[], []]
    assert (run.recipe.output_dir / "metrics.jsonl").read_bytes() == before


def failure(recipe: Recipe, stage: int) -> tuple[str, str]:
    """What stops a run, and where its messages went."""
    try:
        runs.fit(recipe, stage)
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    rates = [f"optim.lr.{name}=1e30" for name in ("vision", "connector", "language")]
    recipe = helpers.recipe(
        runs.new_folder(), *rates, "train.checkpoint_every=1", "health.on_nonfinite=stop"
    )
    ((name, message),) = ranks(1).run(failure, recipe, 2)
    assert name == "HealthError"
    assert message.startswith("step 2: the loss is nan; samples are in ")
    # what was saved before is still there to go on from
    assert (runs.checkpoint(recipe, 1) / "COMPLETE").exists()
    rows = read_rows(recipe.output_dir / "metrics.jsonl")
    assert [(row["event"], row["step"]) for row in rows] == [("train", 1), ("checkpoint", 1)]
    summary = json.loads((recipe.output_dir / "run_summary.json").read_text())
    assert summary["status"] == "failed"
    assert summary["error"].startswith("HealthError: step 2: the loss is nan")


def test_stage_0_has_a_gradient_norm_too() -> None:
    recipe = helpers.recipe(runs.new_folder(), "train.steps=1", "train.checkpoint_every=0")
    ((step,),) = ranks(1).run(runs.fit, recipe, 0)
    row = read_rows(recipe.output_dir / "metrics.jsonl")[0]
    assert row["grad_norm"] == step.result.grad_norm > 0


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/run: Not a directory"):
        make_folder(tmp_path / "file/run")


def test_a_rate_of_zero_trains_nothing_there() -> None:
    """Neither an error of the movement check, nor movement."""
    recipe = helpers.recipe(runs.new_folder(), "optim.lr.vision=0", "train.steps=2")
    ranks(1).run(runs.fit, recipe, 2)
    start = registry.build(recipe.model, len(data.load_tokenizer(recipe)), recipe.seed)
    end = registry.load(runs.checkpoint(recipe, 2) / "model")
    for (name, one), other in zip(start.named_parameters(), end.parameters(), strict=True):
        if name.startswith("vision."):
            assert torch.equal(one, other), name
    assert not torch.equal(start.connector.q_init.weight, end.connector.q_init.weight)


def states_at_the_start(recipe: Recipe, before: int) -> dict[str, object]:
    """Random states of a run, in a process that drew other numbers before."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(before)
    run.build_run(recipe, helpers.resolved(2, 1), runs.machine(), Preemption())
    return rng_state()


def test_random_states_are_a_function_of_the_recipe() -> None:
    recipes = [helpers.recipe(runs.new_folder(), f"seed={seed}") for seed in (0, 0, 1)]
    first, again, other = (
        ranks(1).run(states_at_the_start, recipe, before)[0]
        for before, recipe in enumerate(recipes)
    )
    assert first == again
    assert all(first[kind] != other[kind] for kind in ("torch", "numpy", "python"))
