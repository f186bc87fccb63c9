"""Shapes from the plan alone against those of batches that the loader makes."""

import itertools
import json
from contextlib import closing
from pathlib import Path

import pytest

from tests.train import helpers
from vlm.data.plan import planning
from vlm.data.plan.position import Position
from vlm.errors import DataError
from vlm.estimate import workload
from vlm.estimate.workload import _shapes
from vlm.models.flops.shapes import Shapes, shapes_of
from vlm.train import data


def test_shapes_are_those_of_the_batches_to_come(tmp_path: Path) -> None:
    recipe = helpers.recipe(tmp_path)
    tokenizer = data.load_tokenizer(recipe)
    source = data.open_source(recipe, tokenizer, training=True)
    work = workload.of_recipe(recipe, (1, 1), 2)
    assert len(work.steps) == recipe.train.steps
    for rank in range(2):
        with closing(data.steps(source, recipe, rank, 2, Position())) as steps:
            for found, loaded in zip(work.steps, itertools.islice(steps, 3), strict=False):
                for shapes, batch in zip(found[rank], loaded.batches, strict=True):
                    real = shapes_of(batch)
                    assert shapes._replace(prefixes=()) == real._replace(prefixes=())
                    for guess, prefix in zip(shapes.prefixes, real.prefixes, strict=True):
                        assert abs(guess - prefix) <= workload.HEADER


def amounts(shapes: Shapes) -> dict[str, int]:
    return {
        "padded": len(shapes.lengths) * max(shapes.lengths),
        "frames": shapes.num_frames,
        "padded frames": len(shapes.frames) * max(shapes.frames),
        "learned": shapes.num_loss_tokens,
    }


def test_the_heaviest_are_found_wherever_in_the_run_they_are(tmp_path: Path) -> None:
    """Against every micro-batch of every step, one after another."""
    recipe = helpers.recipe(tmp_path, "data.window=16", "data.loss_on=all", "train.steps=9")
    seen: list[tuple[int, int]] = []
    work = workload.of_recipe(recipe, (1, 1), 2, lambda *at: seen.append(at))
    _, plan = planning.open_plan(recipe)
    run = list(itertools.islice(plan.steps(), recipe.train.steps))
    windows = [planned.at.window for planned in run for _ in planned.step]
    assert [done for done, _ in seen] == [
        1 + max(i for i, planned in enumerate(run) if planned.at.window == window)
        for window in sorted(set(windows))
    ]
    size = work.worst[0].frame_size
    real = [amounts(_shapes(plan, micro, size)) for one in run for micro in one.step]
    found = [amounts(shapes) for shapes in work.worst]
    where = {}
    for aspect in ("padded", "frames", "padded frames", "learned"):
        most = max(one[aspect] for one in real)
        assert max(one[aspect] for one in found) == most
        where[aspect] = windows[[one[aspect] for one in real].index(most)]
    # not in the window that comes first
    assert max(where.values()) > 0, where
    # all together, at the price that the plan has for a frame
    price = 1 + recipe.data.frame_cost
    totals = [
        [
            one["padded"] + price * (one["frames"] + one["padded frames"]) + one["learned"]
            for one in some
        ]
        for some in (found, real)
    ]
    assert max(totals[0]) == max(totals[1])


def test_a_batch_of_any_shape() -> None:
    for shapes in (
        Shapes((12, 5, 8), (7, 0, 6), (3, 0, 2), 9, (16, 16)),
        Shapes((5, 6), (0, 0), (0, 0), 9, (8, 8)),
    ):
        built = shapes_of(workload.batch_of(shapes, 1))
        assert built.lengths == shapes.lengths
        assert max(built.prefixes) <= max(shapes.prefixes)
        assert built._replace(prefixes=()) == shapes._replace(prefixes=())


def test_without_a_manifest_the_worst_case_is_stated(tmp_path: Path) -> None:
    recipe = helpers.recipe(tmp_path, f"data.train={tmp_path}/none.parquet", "data.budget=4000")
    work = workload.of_recipe(recipe, (16, 24), 2)
    cost = 64 + 256 + 64 * recipe.data.frame_cost
    (worst,) = work.worst
    assert worst.lengths == (320,) * int(4000 // cost)
    assert worst.frame_size == (16, 24)
    assert f"{64 * len(worst.lengths) // 64} samples with 64 frames of 16 x 24 px" in work.source
    assert [len(own) for own in work.steps[0]] == [2, 2]


def test_what_is_assumed_fits_the_budget(tmp_path: Path) -> None:
    keys = ("data.budget=1200", "data.frame_cost=120")
    recipe = helpers.recipe(tmp_path, f"data.train={tmp_path}/none.parquet", *keys)
    (worst,) = workload.of_recipe(recipe, (16, 16), 2).worst
    assert worst.frames == (7,)  # 7 x 121 tokens of 1200 - 256
    limited = [{"name": "a", "manifest": f"{tmp_path}/none.parquet", "max_frames": 1}]
    recipe = helpers.recipe(tmp_path, f"data.train={json.dumps(limited)}", *keys)
    (worst,) = workload.of_recipe(recipe, (16, 16), 2).worst
    assert worst.frames == (1,) * 3 and worst.lengths == (257,) * 3


def test_pairs_are_two_samples_each(tmp_path: Path) -> None:
    recipe = helpers.recipe(
        tmp_path,
        f"data.train={helpers.pairs()}/train.parquet",
        "data.loss_on=preference",
        "data.text_frac=0",
        "data.augment={}",
        "model.connector={query_dim: 20, coarse_weight: 0}",
    )
    source = data.open_source(recipe, data.load_tokenizer(recipe), training=True)
    found = workload.of_recipe(recipe, (1, 1), 1)
    with closing(data.steps(source, recipe, 0, 1, Position())) as steps:
        loaded = next(steps)
    for shapes, batch in zip(found.steps[0][0], loaded.batches, strict=True):
        real = shapes_of(batch)
        assert shapes.frames == real.frames and sum(shapes.lengths) == sum(real.lengths)
        assert max(abs(a - b) for a, b in zip(shapes.lengths, real.lengths, strict=True)) <= 1


def test_a_damaged_manifest_is_no_missing_one(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"no")
    recipe = helpers.recipe(tmp_path, f"data.train={tmp_path}/broken.parquet")
    with pytest.raises(DataError, match=r"broken\.parquet"):
        workload.of_recipe(recipe, (16, 16), 2)
