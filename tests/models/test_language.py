"""Rows with pads on the right equal samples one by one, and the flat layout equals rows."""

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from tests.models.tiny import make_batch, make_lm
from vlm.models.language import (
    LanguageModel,
    coordinates,
    to_rows,
)

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
    torch.testing.assert_close(
        language.token_losses(hidden, batch).sum().double(), total, rtol=1e-6, atol=0
    )
    # transformers sums its loss in float32
    torch.testing.assert_close(total.float(), plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_chunks", [2, 3, 100])
def test_a_loss_in_pieces_is_the_loss(language, num_chunks):
    """100 pieces: more than there are learned tokens, so some are empty."""
    batch = make_batch(SAMPLES)
    assert batch.num_loss_tokens < 100

    def run(chunks):
        language.num_loss_chunks = chunks
        language.zero_grad()
        hidden = language(language.embed(batch.input_ids), batch)
        loss = language.token_losses(hidden, batch).sum()
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in language.parameters()]

    (loss, gradients), (expected, plain) = run(num_chunks), run(1)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for a, b in zip(gradients, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)  # logits are scored in float32


def test_a_loss_in_pieces_keeps_no_logits():
    language = LanguageModel(make_lm(vocab_size=3000)).train()
    batch = make_batch([(0, 400)])
    hidden = torch.randn(batch.input_ids.numel(), language.dim, requires_grad=True)

    def kept_bytes(chunks):
        language.num_loss_chunks = chunks
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.numel() * t.element_size()) or t, lambda t: t
        ):
            language.token_losses(hidden, batch).sum()
        return sum(kept)

    logits = batch.num_loss_tokens * 3000 * 4
    assert kept_bytes(1) > logits
    assert kept_bytes(8) < 0.2 * logits


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
    cache = DynamicCache()
    padded = torch.cat([embeds[:, :5], torch.zeros_like(embeds[:, :3])], dim=1)
    language.run_rows(padded, cache)
    mask = torch.tensor([[1] * 5 + [0] * 3 + [1]])
    state = language.run_rows(embeds[:, 5:], cache, mask, torch.tensor([[5]]))
    torch.testing.assert_close(state[:, 0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("flat", [False, True])
def test_a_prefix_of_text_alone_is_its_first_state(language, flat, monkeypatch):
    monkeypatch.setattr(LanguageModel, "is_flat", property(lambda self: flat))
    batch = make_batch([(0, 5), (0, 3)])
    embeds = language.embed(batch.input_ids)
    expected = one_by_one(language, batch, embeds)[:1]
    found = language(embeds, batch, prefix_only=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_cast_leaves_rotary_frequencies_alone():
    """DeepSpeed casts whole modules; rounded, frequencies are a radian off at position 1000."""
    lm = make_lm(hidden_size=256, num_attention_heads=2)
    rotary = lm.model.rotary_emb
    positions, states = torch.arange(1000)[None], torch.zeros(1, 1, 256)
    expected = rotary(states, positions)
    rounded = rotary.inv_freq.bfloat16().float()
    assert (999 * (rounded - rotary.inv_freq)).abs().max() > 1
    cast = LanguageModel(lm).bfloat16()
    assert {p.dtype for p in cast.parameters()} == {torch.bfloat16}
    for found, angle in zip(rotary(states, positions), expected, strict=True):
        assert torch.equal(found, angle)


def test_no_gradient_changes_with_gradient_checkpointing(language):
    batch = make_batch(SAMPLES)

    def gradients():
        language.zero_grad()
        hidden = language(language.embed(batch.input_ids), batch)
        language.token_losses(hidden, batch).sum().backward()
        return [p.grad.clone() for p in language.parameters()]

    language.train()
    plain = gradients()
    language.lm.gradient_checkpointing_enable({"use_reentrant": False})
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
