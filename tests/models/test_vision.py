"""The patch stream equals the plain model's; the query equals an extra token under a mask."""

import math

import pytest
import torch

from tests.models.tiny import SIZE, make_tower
from vlm.models.vision import VisionEncoder

REGISTERS = {"model_type": "dinov2_with_registers", "num_register_tokens": 2}


@pytest.fixture(params=[{}, REGISTERS], ids=["dinov2", "registers"])
def encoder(request):
    torch.manual_seed(0)
    return VisionEncoder(make_tower(**request.param)).double().eval()


@pytest.fixture
def frames():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (5, 3, SIZE, SIZE), generator=generator).to(torch.uint8)


def test_patch_stream_equals_the_plain_model(encoder, frames):
    plain = encoder.tower(encoder.normalise(frames)).last_hidden_state
    ours, cache = encoder(frames)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    assert len(cache) == 2
    assert cache[0].key.shape == (5, 2, plain.shape[1], 12)


def test_query_equals_an_extra_token_that_patches_do_not_see(encoder, frames):
    """Reference: the tower's own layers over [patches, query] with an additive mask."""
    torch.manual_seed(2)
    query = torch.randn(5, encoder.dim, dtype=torch.float64)
    hidden = torch.cat([encoder.tower.embeddings(encoder.normalise(frames)), query[:, None]], dim=1)
    num_tokens = hidden.shape[1]
    mask = torch.zeros(num_tokens, num_tokens, dtype=torch.float64)
    mask[:, -1] = -math.inf  # nobody sees the query, not even itself
    for layer in encoder.tower.encoder.layer:
        hidden = layer(hidden, mask[None, None])
    expected = encoder.tower.layernorm(hidden)
    ours, cache = encoder(frames)
    torch.testing.assert_close(encoder.look(query, cache), expected[:, -1], rtol=0, atol=1e-12)
    torch.testing.assert_close(ours, expected[:, :-1], rtol=0, atol=1e-12)


def test_attention_maps_are_probabilities_and_follow_the_query(encoder, frames):
    _, cache = encoder(frames)
    torch.manual_seed(3)
    one, other = torch.randn(2, 5, encoder.dim, dtype=torch.float64)
    maps = encoder.attention(one, cache)
    assert maps.shape == (5, 2, 2, cache[0].key.shape[2])
    torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]))
    assert (maps - encoder.attention(other, cache)).abs().max() > 1e-3


def test_attention_map_of_the_first_layer_by_hand(encoder, frames):
    _, cache = encoder(frames)
    torch.manual_seed(4)
    query = torch.randn(5, encoder.dim, dtype=torch.float64)
    layer = encoder.tower.encoder.layer[0]
    q = layer.attention.q_proj(layer.norm1(query))
    head_dim = 12
    for head in range(2):
        part = q[:, head * head_dim : (head + 1) * head_dim]
        scores = torch.einsum("fd,fpd->fp", part, cache[0].key[:, head]) / math.sqrt(head_dim)
        torch.testing.assert_close(
            encoder.attention(query, cache)[:, 0, head], scores.exp() / scores.exp().sum(-1, True)
        )


def test_gradient_checkpointing_changes_no_gradient(encoder, frames):
    def gradients():
        encoder.zero_grad()
        last, cache = encoder(frames)
        looked = encoder.look(last[:, 0], cache)
        looked.square().sum().backward()
        return [p.grad.clone() for p in encoder.parameters() if p.grad is not None]

    encoder.train()
    plain = gradients()
    encoder.gradient_checkpointing = True
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
