"""Preferences are trained against what the model said before, on any number of ranks."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.distributed import ranks
from tests.train import helpers, runs
from vlm.config import Recipe
from vlm.data.format.schema import Preference, Turn
from vlm.data.load.reader import Reader
from vlm.data.plan import planning
from vlm.data.text import chat
from vlm.train import model as models
from vlm.train.metrics import read_rows
from vlm.train.reference import FILE

STEPS = 6


def recipe(folder: Path, *more: str) -> Recipe:
    pairs = helpers.pairs()
    return helpers.recipe(
        folder,
        f"data.train=[{{manifest: {pairs}/train.parquet, repeat: 2}}]",
        f"data.eval={pairs}/eval.parquet",
        "data.loss_on=preference",
        "data.text_frac=0",
        "data.augment={}",
        "model.vision.config.drop_path_rate=0",
        "model.language.config.attention_dropout=0",
        "model.connector.coarse_weight=0",
        "optim.lr={vision: 3.0e-3, connector: 3.0e-3, language: 3.0e-3}",
        "optim.schedule={name: constant, warmup_frac: 0}",
        f"train.steps={STEPS}",
        *more,
    )


@functools.cache
def trained(world_size: int, stage: int) -> Recipe:
    found = recipe(runs.new_folder())
    ranks(world_size).run(runs.fit, found, stage)
    return found


def test_the_reference_is_what_the_plain_language_model_says() -> None:
    """Sequence by sequence through transformers' own forward pass, frames put in by hand."""
    found = trained(1, 2)
    known = load_file(found.output_dir / FILE)
    catalog, _ = planning.open_plan(found)
    tokenizer = chat.load_tokenizer(found.model.tokenizer, found.model.image_token)
    model = models.build(found, len(tokenizer)).eval()
    image = tokenizer.convert_tokens_to_ids(found.model.image_token)
    assert known["train"].shape == (32, 2) and known["eval"].shape == (8, 2)
    for row in (0, 1, 5):
        loaded = Reader(catalog).read(row)
        pair = loaded.sample.preference
        assert isinstance(pair, Preference)
        for branch, answer in enumerate((pair.chosen, pair.rejected)):
            turns = (*pair.prompt, Turn(role="assistant", content=answer))
            encoded = chat.encode(tokenizer, turns, found.model.image_token)
            encoded = chat.expand_frames(encoded, len(loaded.frames), 1, image)
            expected = log_prob(model, loaded.frames, encoded)
            assert known["train"][row, branch] == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def log_prob(model: torch.nn.Module, frames: np.ndarray, encoded: chat.Encoded) -> float:
    """Coarse pass, queries, fine pass and log-probability of one sequence, step by step."""
    ids, pixels = torch.tensor(encoded.input_ids), torch.from_numpy(frames).permute(0, 3, 1, 2)
    lm, connector = model.language.lm, model.connector
    places = [i for i, label in enumerate(ids.tolist()) if label == ids[0]][: len(frames)]
    _, cache = model.vision(pixels)
    embeds = lm.get_input_embeddings()(ids)
    queries = connector.q_static(len(frames))
    for _ in range(2):
        embeds[places] = connector(model.vision, cache, queries)
        output = lm(inputs_embeds=embeds[None], output_hidden_states=True)
        asked = connector.llm_to_query(output.hidden_states[-1][0, places])
        queries = torch.cat([connector.q_init(1), asked[:-1]])
    logits = output.logits[0].double().log_softmax(-1)
    learned = [i for i, label in enumerate(encoded.labels) if label != -100]
    return sum(float(logits[i - 1, encoded.labels[i]]) for i in learned)


def test_the_better_answers_become_likelier() -> None:
    rows = read_rows(trained(1, 2).output_dir / "metrics.jsonl")
    train = [row for row in rows if row["event"] == "train"]
    assert train[0]["loss"] == pytest.approx(np.log(2), rel=1e-4)  # nothing is gained yet
    assert train[-1]["reward_accuracy"] == 1 and train[-1]["reward_margin"] > 0.1
    assert train[-1]["loss"] < 0.65 < np.log(2)
    held_out = [row for row in rows if row["event"] == "eval"]
    assert held_out[-1]["eval_reward_accuracy"] == 1
    assert held_out[-1]["eval_loss"] == held_out[-1]["eval_loss_fine"] < 0.65


def test_two_ranks_measure_and_learn_the_same() -> None:
    """Under ZeRO-3, where ranks must call the model alike."""
    one, two = trained(1, 2), trained(2, 3)
    for split, expected in load_file(one.output_dir / FILE).items():
        np.testing.assert_allclose(load_file(two.output_dir / FILE)[split], expected, rtol=1e-4)
    losses = [
        [row["loss"] for row in read_rows(run.output_dir / "metrics.jsonl") if row["loss"]]
        for run in (one, two)
    ]
    assert len(losses[0]) == STEPS
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


def test_it_is_measured_once_and_a_run_does_not_go_on_without_it() -> None:
    folder = runs.new_folder()
    done = trained(1, 2)
    first = recipe(folder, "optim.dpo_beta=0.2")
    ranks(1).run(runs.fit, first, 2)
    path = folder / FILE
    before = path.stat().st_mtime_ns
    assert path.read_bytes() == (done.output_dir / FILE).read_bytes()
    assert ranks(1).run(runs.fit, first, 2) == [[]]  # it is done, and says so
    assert path.stat().st_mtime_ns == before
    path.unlink()
    (refusal,) = ranks(1).run(runs.refused, first, 2)
    assert "bring the file back, or choose another output_dir" in refusal


def test_what_pairs_cannot_be_compared_in_is_refused(tmp_path: Path) -> None:
    for override, said in (
        ("data.text_frac=0.1", "data.text_frac, expected 0"),
        ("data.augment={shift_px: 1}", "data.augment, expected none"),
        ("train.modes={coarse_only: 1, coarse_fine: 1}", "train.modes, expected at most one"),
        ("model.connector.coarse_weight=1", "coarse_weight and fine_loss, expected 0 and final"),
    ):
        with pytest.raises(Exception, match=said):
            recipe(tmp_path, override)


def test_conversations_are_no_pairs() -> None:
    world = helpers.world()
    mixed = recipe(runs.new_folder(), f"data.train={world}/train.parquet")
    (refusal,) = ranks(1).run(runs.refused, mixed, 2)
    assert "expected a preference pair; leave its source out" in refusal
