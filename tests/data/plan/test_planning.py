import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data import helpers
from tests.data.conftest import IMAGE_TOKEN
from vlm import config
from vlm.data.manifest import manifest
from vlm.data.plan import catalog, planning
from vlm.data.plan.catalog import Catalog
from vlm.data.plan.plan import Plan, step_hash
from vlm.data.plan.policy import SourcePolicy
from vlm.errors import ConfigError, DataError


def make_recipe(**data: Any) -> config.Recipe:
    part = {"config": {"model_type": "any"}}
    return config.Recipe.model_validate(
        {
            "name": "test",
            "output_dir": "runs",
            "seed": 5,
            "model": {
                "family": "foveated",
                "vision": part,
                "language": part,
                "tokenizer": "tokenizer",
            },
            "data": {"train": "t", "eval": "e", "micro_batches": 8, "budget": 300, **data},
            "train": {"steps": 1},
        }
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Catalog:
    folder = tmp_path_factory.mktemp("shards")
    paths = helpers.write_shards(folder, [0, 1, 2, 3, 5, 8, 1, 0, 9] * 8, per_shard=20)
    manifest.build(paths, str(tokenizer_path), IMAGE_TOKEN, folder / "m.parquet")
    return catalog.load([("t", folder / "m.parquet", 1)])


def make_plan(found: Catalog, recipe: config.Recipe) -> Plan:
    policy = planning.policy_from_recipe(recipe)
    rows = planning.rows_from_catalog(found, recipe.data.loss_on)
    return Plan(rows, policy, ["fingerprint"])


def test_a_policy_is_the_recipe() -> None:
    data: dict[str, Any] = {
        "batching": "packed",
        "micro_batches": 4,
        "budget": 77,
        "frame_cost": 1.5,
        "text_frac": 0.25,
        "window": 9,
        "loss_on": "all",
    }
    policy = planning.policy_from_recipe(make_recipe(**data))
    assert vars(policy) == {
        **data,
        "seed": 5,
        "tokens_per_frame": 1,
        "sources": (SourcePolicy(name="t"),),
        "weight_by": "samples",
        "weights_at": (),
        "question_first_frac": 0.0,
        "max_text_tokens": None,
    }


@pytest.mark.parametrize(
    "frac,orders,asked",
    [
        (0, [], ("frames_first",)),
        (1, [], ("question_first",)),
        (0.5, [], ("frames_first", "question_first")),
        (0, ["question_first", "frames_first"], ("question_first", "frames_first")),
        (1, ["frames_first", "frames_first"], ("frames_first",)),
    ],
)
def test_held_out_samples_are_asked_in_the_first_of_the_orders(
    found: Catalog, frac: float, orders: list[str], asked: tuple[str, ...]
) -> None:
    manifest_path = found.sources[0].manifest.path
    recipe = make_recipe(
        train=str(manifest_path),
        eval=str(manifest_path),
        question_first_frac=frac,
        eval_orders=orders,
    )
    assert recipe.data.orders == asked
    _, trained = planning.open_plan(recipe)
    _, held_out = planning.open_plan(recipe, training=False)
    assert trained.policy.question_first_frac == frac
    drawn = {held_out.question_first(row, 0) for row in range(50)}
    assert drawn == {asked[0] == "question_first"}


def test_frames_cost_the_tokens_of_their_connector(found: Catalog) -> None:
    lengths = {}
    for per_frame, family, connector in (
        (1, "foveated", {}),
        (16, "multi_token", {}),
        (49, "multi_token", {"tokens_per_frame": 49}),
        (0, "blind", {}),
    ):
        recipe = make_recipe(budget=3000)
        values = {"family": family, "connector": connector, "freeze": ["vision", "connector"]}
        model = type(recipe.model).model_validate(recipe.model.model_dump() | values)
        plan = make_plan(found, recipe.model_copy(update={"model": model}))
        assert plan.policy.tokens_per_frame == per_frame
        step = next(plan.steps()).step
        lengths[per_frame] = [(b.num_tokens, b.num_frames, b.rows) for b in step]
    for per_frame, batches in lengths.items():
        for num_tokens, num_frames, rows in batches:
            text = int(found.num_tokens[rows].sum())
            assert num_tokens == text + per_frame * num_frames


def test_a_seed_that_does_not_fit_is_refused() -> None:
    recipe = make_recipe().model_copy(update={"seed": 1 << 64})
    with pytest.raises(ConfigError, match="seed=18446744073709551616"):
        planning.policy_from_recipe(recipe)


def test_rows_are_the_catalog(found: Catalog) -> None:
    rows = planning.rows_from_catalog(found, "answers")
    assert rows.num_frames.tolist() == [0, 1, 2, 3, 5, 8, 1, 0, 9] * 8
    assert rows.num_loss_tokens is found.num_answer_tokens
    assert planning.rows_from_catalog(found, "all").num_loss_tokens is found.num_tokens
    assert (np.diff(rows.shard.astype(int)) >= 0).all()


@pytest.mark.parametrize("batching", ["bucketed", "packed"])
def test_world_size_changes_ranks_and_nothing_else(found: Catalog, batching: str) -> None:
    made = make_plan(found, make_recipe(batching=batching, text_frac=0.2))
    shown = {w: planning.describe(made, found, w, 5) for w in (1, 2, 4, 8)}
    for world_size, one in shown.items():
        assert len(one["steps"]) == 5
        for step, alone in zip(one["steps"], shown[1]["steps"], strict=True):
            ranks = [batch.pop("rank") for batch in step["micro_batches"]]
            assert np.bincount(ranks).tolist() == [8 // world_size] * world_size
            assert step["hash"] == alone["hash"]
        if world_size > 1:
            assert one["steps"] == shown[1]["steps"]
            assert one["balance"] >= 1
    assert shown[1]["balance"] == 1


def test_a_cut_text_is_planned_as_it_will_be(found: Catalog) -> None:
    rows = planning.rows_from_catalog(found, "answers", 6)
    assert rows.num_tokens.tolist() == [min(6, n) for n in found.num_tokens.tolist()]


def test_samples_that_teach_nothing_are_an_error_before_anything_starts(
    found: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a manifest of another tool may say."""
    counts = found.num_answer_tokens.copy()
    counts[[7, 9]] = 0
    silent = dataclasses.replace(found, num_answer_tokens=counts)
    monkeypatch.setattr(catalog, "load", lambda sources: silent)
    with pytest.raises(DataError, match=r"2 of 72 samples have no learned token .*the first: .*7"):
        planning.open_plan(make_recipe(micro_batches=1))
    planning.open_plan(make_recipe(micro_batches=1, loss_on="all"))


def test_a_step_is_described_as_it_is(found: Catalog) -> None:
    made = make_plan(found, make_recipe(frame_cost=2.0, text_frac=0.2))
    shown = planning.describe(made, found, 2, 1)
    (step,) = made.window(0)[:1]
    keys = [found.key(int(row)) for batch in step for row in batch.rows]
    assert shown["steps"][0]["hash"] == step_hash(keys)
    assert shown["plan_id"] == made.plan_id
    for batch, described in zip(step, shown["steps"][0]["micro_batches"], strict=True):
        assert described.pop("rank") in (0, 1)
        frames = int(found.num_frames[batch.rows].sum())
        assert described == {
            "kind": batch.kind,
            "num_samples": len(batch.rows),
            "num_frames": frames,
            "num_tokens": int(found.num_tokens[batch.rows].sum()) + frames,
            "cost": batch.cost,
        }
