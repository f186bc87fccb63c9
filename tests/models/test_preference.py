"""The loss of pairs against loops over the published formula, and HF's own forward pass."""

import dataclasses
import math

import pytest
import torch

from tests.models import tiny
from vlm.batch import Batch
from vlm.engine import ladder
from vlm.models import preference

BETA = 0.3


def pairs(per_frame: int = 1, **changes) -> Batch:
    """Three pairs: two frames, one, and text alone; the second branch of each is longer."""
    shapes = [(2, 5), (2, 8), (1, 4), (1, 9), (0, 6), (0, 7)]
    batch = tiny.make_batch(shapes, per_frame=per_frame)
    reference = torch.tensor([[-3.0, -4.5], [-2.0, -9.0], [-6.0, -5.0]])
    return dataclasses.replace(
        batch,
        pair_rows=torch.tensor([7, 3, 5]),
        **{"reference": reference, "dpo_beta": BETA} | changes,
    )


def published(policy: list[float], reference: list[list[float]]) -> tuple[float, float, float]:
    """Loss, accuracy and margin, summed over pairs, in plain floats."""
    loss = accuracy = margin = 0.0
    for pair, known in enumerate(reference):
        chosen = policy[2 * pair] - known[0]
        rejected = policy[2 * pair + 1] - known[1]
        gain = BETA * (chosen - rejected)
        loss += math.log1p(math.exp(-gain))
        accuracy += gain > 0
        margin += gain
    return loss, accuracy, margin


def test_the_loss_is_the_published_formula() -> None:
    batch = pairs()
    losses = torch.rand(batch.num_loss_tokens, dtype=torch.float64, requires_grad=True)
    edges = batch.cu_seqlens.tolist()
    policy = []
    for start, stop in zip(edges, edges[1:], strict=False):
        own = [i for i, at in enumerate(batch.target_index.tolist()) if start <= at < stop]
        policy.append(-sum(losses[i].item() for i in own))
    assert batch.reference is not None
    expected = published(policy, batch.reference.tolist())
    total, parts = preference.objective(losses, batch)
    found = (total, parts["reward_accuracy"], parts["reward_margin"])
    assert [value.item() for value in found] == pytest.approx(expected, rel=1e-12)
    assert batch.num_losses == 3
    total.backward()
    for index in (0, len(losses) - 1):  # the slope of a token: numerically
        step, values = 1e-6, losses.detach().clone()
        values[index] += step
        slope = (preference.objective(values, batch)[0] - total.detach()) / step
        assert float(slope) == pytest.approx(float(losses.grad[index]), abs=1e-5)


def test_log_probabilities_are_those_of_the_plain_language_model() -> None:
    model = tiny.make_baseline(seed=4)  # blind: text alone
    batch = pairs(per_frame=0)
    found = preference.answer_log_probs(model(batch).token_losses, batch)
    edges = batch.cu_seqlens.tolist()
    for sample, (start, stop) in enumerate(zip(edges, edges[1:], strict=False)):
        ids, labels = batch.input_ids[start:stop], batch.labels[start:stop]
        logits = model.language.lm(ids[None]).logits[0]
        summed = sum(
            torch.log_softmax(logits[i - 1], -1)[labels[i]]
            for i in range(1, len(ids))
            if labels[i] != -100
        )
        assert float(found[sample]) == pytest.approx(float(summed), rel=1e-6)


@pytest.mark.parametrize("mode", ["coarse_fine", "coarse_only", "autoregressive"])
def test_a_model_is_trained_on_the_pairs_of_its_mode(mode: str) -> None:
    model = tiny.make_model(coarse_weight=0.0)
    batch = pairs()
    plain = dataclasses.replace(batch, reference=None)
    alone = model(plain, mode=mode).token_losses
    expected, measured = preference.objective(alone, batch)
    found = model(batch, mode=mode, measure_all=True)
    assert float(found.loss_sum) == pytest.approx(float(expected), rel=1e-12)
    name = "coarse" if mode == "coarse_only" else "fine"
    assert set(found.parts) == {name, "reward_accuracy", "reward_margin"}
    assert float(found.parts["reward_margin"]) == pytest.approx(float(measured["reward_margin"]))
    assert torch.equal(found.token_losses, alone)
    if mode != "autoregressive":
        found.loss_sum.backward()
        assert all(p.grad is not None for p in model.connector.parameters())


def test_nothing_has_been_gained_before_the_first_step() -> None:
    model = tiny.make_baseline(tokens_per_frame=4)
    batch = pairs(per_frame=4)
    plain = dataclasses.replace(batch, reference=None)
    before = preference.answer_log_probs(model(plain).token_losses, plain).view(-1, 2)
    output = model(dataclasses.replace(batch, reference=before))
    assert float(output.loss_sum) == pytest.approx(3 * math.log(2), rel=1e-6)
    assert float(output.parts["reward_margin"]) == float(output.parts["reward_accuracy"]) == 0


def test_pairs_stay_together_where_memory_is_short() -> None:
    model = tiny.make_model(coarse_weight=0.0)
    whole = model(pairs()).loss_sum
    for rung in (1, 2, 3):
        pieces = ladder.cut([pairs()], rung)
        assert len(pieces) == 2**rung and sum(piece.num_losses for piece in pieces) == 3
        rows = torch.cat([piece.pair_rows for piece in pieces])
        assert rows.tolist() == [7, 3, 5]
        total = sum(model(piece).loss_sum for piece in pieces)
        assert float(total) == pytest.approx(float(whole), rel=1e-6)
