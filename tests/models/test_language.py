"""Rows with pads on the right equal samples one by one, and the flat layout equals rows."""

import pytest
import torch
import torch.nn.functional as F

from tests.models.tiny import make_batch, make_lm
from vlm.batch import shift_labels
from vlm.models.language import LanguageModel, coordinates, new_cache, to_rows

SAMPLES = [(3, 7), (1, 12), (0, 5), (6, 2)]


@pytest.fixture
def language():
    torch.manual_seed(0)
    return LanguageModel(make_lm()).double().eval()


def one_by_one(language, batch, embeds):
    pieces = [
        language.lm.get_decoder()(inputs_embeds=embeds[None, a:b]).last_hidden_state[0]
        for a, b in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)
    ]
    return torch.cat(pieces)


@pytest.mark.parametrize("flat", [False, True])
def test_layouts_equal_samples_one_by_one(language, flat, monkeypatch):
    monkeypatch.setattr(LanguageModel, "is_flat", property(lambda self: flat))
    batch = make_batch(SAMPLES)
    embeds = language.embed(batch.input_ids)
    expected = one_by_one(language, batch, embeds)
    torch.testing.assert_close(language(embeds, batch), expected, rtol=0, atol=1e-12)
    prefix = language(embeds, batch, prefix_only=True)
    torch.testing.assert_close(prefix, expected[batch.frame_index], rtol=0, atol=1e-12)


def test_loss_equals_a_loop_over_tokens_and_the_plain_model(language):
    batch = make_batch(SAMPLES)
    hidden = language(language.embed(batch.input_ids), batch)
    logits = language.logits(hidden)
    total, plain = 0.0, 0.0
    for a, b in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        for i in range(a, b - 1):
            if batch.labels[i + 1] != -100:
                total += F.cross_entropy(logits[i], batch.labels[i + 1])
        labels = batch.labels[None, a:b].clone()
        labels[0, 0] = -100
        count = int((labels[0, 1:] != -100).sum())
        plain += language.lm(input_ids=batch.input_ids[None, a:b], labels=labels).loss * count
    torch.testing.assert_close(language.loss_sum(hidden, batch).double(), total, rtol=1e-6, atol=0)
    torch.testing.assert_close(total, plain)


def test_shift_never_crosses_samples():
    labels = torch.tensor([1, 2, 3, 4, 5])
    shifted = shift_labels(labels, torch.tensor([0, 2, 5]))
    assert shifted.tolist() == [2, -100, 4, 5, -100]


def test_rows_round_trip():
    batch = make_batch(SAMPLES)
    values = torch.arange(batch.input_ids.numel() * 2.0).view(-1, 2)
    rows = to_rows(values, batch)
    assert rows.shape == (4, batch.max_seqlen, 2)
    assert torch.equal(rows[coordinates(batch)], values)
    assert rows.sum() == values.sum()


def test_cache_continues_behind_pads(language):
    """A masked pad in the cache changes nothing for the tokens after it."""
    torch.manual_seed(1)
    ids = torch.randint(4, 50, (1, 6))
    expected = language.lm.get_decoder()(input_ids=ids).last_hidden_state[:, -1]
    embeds = language.embed(ids)
    cache = new_cache()
    padded = torch.cat([embeds[:, :5], torch.zeros_like(embeds[:, :3])], dim=1)
    language.run_rows(padded, cache)
    mask = torch.tensor([[1] * 5 + [0] * 3 + [1]])
    state = language.run_rows(embeds[:, 5:], cache, mask, torch.tensor([[5]]))
    torch.testing.assert_close(state[:, 0], expected, rtol=0, atol=1e-12)
