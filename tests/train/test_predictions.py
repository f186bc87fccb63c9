"""Answers that a run writes while it trains, against what its saved model answers later."""

import json
import re

import pytest

from tests.distributed import ranks
from tests.train import helpers, runs
from vlm.config import Recipe
from vlm.data.text import chat
from vlm.errors import ConfigError
from vlm.evaluate import judge
from vlm.evaluate.questions import answer, find_questions
from vlm.train import data, predictions, run
from vlm.train.preempt import Preemption

NUM_PREDICTIONS = 3


@pytest.fixture(scope="module")
def trained() -> Recipe:
    recipe = helpers.recipe(
        runs.new_folder(), f"train.eval_predictions={NUM_PREDICTIONS}", "train.keep_last=3"
    )
    ranks(1).run(runs.fit, recipe, 2)
    return recipe


def test_each_evaluation_writes_the_same_samples(trained: Recipe) -> None:
    lines = (trained.output_dir / predictions.FILE).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    steps = [row["step"] for row in rows]
    assert steps == sorted([helpers.EVERY, helpers.STEPS] * NUM_PREDICTIONS)
    first, last = rows[:NUM_PREDICTIONS], rows[NUM_PREDICTIONS:]
    for name in ("key", "asked", "expected"):
        assert [row[name] for row in first] == [row[name] for row in last]
    assert len({row["key"] for row in first}) == NUM_PREDICTIONS
    assert all(re.fullmatch(r"It is (red|green|blue)\.", row["expected"]) for row in rows)


def test_answers_are_those_of_the_saved_model(trained: Recipe) -> None:
    """The judge asks each question by itself; a sample of one question is the same prompt."""
    recipe, _, model = judge.open_run(trained.output_dir)
    held = judge.held_out(recipe, len(helpers.EVAL))
    lines = (trained.output_dir / predictions.FILE).read_text().splitlines()
    last = {row["key"]: row for row in map(json.loads, lines[NUM_PREDICTIONS:])}
    single = [
        question
        for question in find_questions(held.samples)
        if len(held.samples[question.sample].sample.turns) == 2
        and held.keys[question.sample] in last
    ]
    assert single, "no sample with one question among those predicted"
    for question, text in zip(
        single, answer(model, held.collator, single, held.samples), strict=True
    ):
        given = last[held.keys[question.sample]]["given"]
        # another number of tokens is waited for there
        shorter = min(len(text), len(given))
        assert shorter and given[:shorter] == text[:shorter]


def test_samples_are_evenly_spaced_and_end_with_an_answer(trained: Recipe) -> None:
    source = data.open_source(trained, data.load_tokenizer(trained), training=False)
    catalog = source.catalog
    asked = predictions.ask(catalog, 3, None)
    keys = catalog.keys(range(catalog.num_samples))
    assert [one.key for one in asked] == [keys[0], keys[3], keys[7]]
    assert all(one.turns[-1].role == "user" for one in asked)
    assert len(predictions.ask(catalog, 99, None)) == catalog.num_samples
    few = int(catalog.num_tokens.min())
    short = predictions.ask(catalog, 99, few)
    assert 0 < len(short) < catalog.num_samples
    for one in short:
        encoded = chat.encode(
            source.collator.tokenizer, one.sample.sample.conversation(), helpers.IMAGE_TOKEN
        )
        assert len(encoded.input_ids) <= few


def test_zero_3_cannot_answer_on_one_rank() -> None:
    recipe = helpers.recipe(runs.new_folder(), "train.eval_predictions=2")
    machine = run.Machine(runs.torch.device("cpu"), 0, 1)
    with pytest.raises(ConfigError, match=r"train\.eval_predictions.*ZeRO-3"):
        run.build_run(recipe, helpers.resolved(3, 1), machine, Preemption())
