import shutil
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from tests.train import helpers
from vlm.config import AugmentConfig, Recipe
from vlm.data.plan.plan import Position
from vlm.data.text.tokenizer import train_tokenizer
from vlm.errors import DataError
from vlm.train import data


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return helpers.recipe(Path("unused"))


def open_train(recipe: Recipe) -> data.DataSource:
    return data.open_source(recipe, data.load_tokenizer(recipe), training=True)


def test_training_mixes_text_in_and_augments(recipe: Recipe) -> None:
    source = open_train(recipe)
    assert source.plan.policy.text_frac == helpers.TEXT_FRAC
    assert source.collator.augment == recipe.data.augment != AugmentConfig()
    assert source.catalog.num_samples == len(helpers.TRAIN)


def test_evaluation_has_neither(recipe: Recipe) -> None:
    tokenizer = data.load_tokenizer(recipe)
    source = data.open_source(recipe, tokenizer, training=False)
    assert source.collator.augment == AugmentConfig()
    kinds = {batch.kind for step in source.plan.window(0) for batch in step}
    assert "text" not in kinds


def test_ranks_share_each_step_and_run_all_of_it(recipe: Recipe) -> None:
    source = open_train(recipe)
    with (
        closing(data.steps(source, recipe, 0, 2, Position())) as first,
        closing(data.steps(source, recipe, 1, 2, Position())) as second,
    ):
        for _ in range(4):
            pair = next(first), next(second)
            assert [len(one.batches) for one in pair] == [2, 2]
            assert pair[0].next == pair[1].next
            keys = [key for one in pair for batch in one.batches for key in batch.keys]
            rows = np.concatenate([batch.rows for batch in pair[0].plan])
            assert sorted(keys) == sorted(source.catalog.keys(rows))


def test_a_later_position_goes_on_where_an_earlier_one_got_to(recipe: Recipe) -> None:
    source = open_train(recipe)
    with closing(data.steps(source, recipe, 0, 1, Position())) as steps:
        passed = [next(steps) for _ in range(5)]
    with closing(data.steps(source, recipe, 0, 1, passed[2].next)) as steps:
        for expected in passed[3:]:
            found = next(steps)
            assert [b.keys for b in found.batches] == [b.keys for b in expected.batches]
            for one, other in zip(found.batches, expected.batches, strict=True):
                assert one.frames.equal(other.frames)  # augmented alike


def test_closing_ends_the_threads(recipe: Recipe) -> None:
    before = set(threading.enumerate())
    with closing(data.steps(open_train(recipe), recipe, 0, 1, Position())) as steps:
        next(steps)
        assert set(threading.enumerate()) - before
    assert set(threading.enumerate()) <= before


def test_tokens_counted_with_another_tokenizer(recipe: Recipe, tmp_path: Path) -> None:
    train_tokenizer(["something else entirely"] * 9, tmp_path / "t", 290, helpers.IMAGE_TOKEN)
    other = helpers.recipe(Path("unused"), f"model.tokenizer={tmp_path / 't'}")
    with pytest.raises(DataError, match="another tokenizer"):
        open_train(other)


def test_shards_that_are_gone_or_changed(tmp_path: Path) -> None:
    shutil.copytree(helpers.world() / "shards", tmp_path / "shards")
    shutil.copy(helpers.world() / "train.parquet", tmp_path)
    recipe = helpers.recipe(Path("unused"), f"data.train={tmp_path / 'train.parquet'}")
    open_train(recipe)
    shards = sorted((tmp_path / "shards").glob("train-*.tar"))
    with shards[1].open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(DataError, match=r"train-00001.tar has \d+ bytes, expected \d+"):
        open_train(recipe)
    shards[1].unlink()
    with pytest.raises(DataError, match=r"train-00001.tar is missing"):
        open_train(recipe)
