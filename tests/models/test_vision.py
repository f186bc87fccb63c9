"""The patch stream equals the plain model's; the query equals an extra token under a mask."""

import math

import pytest
import torch

from tests.models.tiny import SIZE, make_tower
from vlm.models.vision import VisionEncoder

REGISTERS = {"model_type": "dinov2_with_registers", "num_register_tokens": 2}
DINOV3 = {"model_type": "dinov3_vit", "num_register_tokens": 2, "pos_embed_rescale": None}
TOWERS = {"dinov2": {}, "registers": REGISTERS, "dinov3": DINOV3}
NUM_FRAMES = 5


def tower(name):
    changes = dict(TOWERS[name])
    if name == "dinov3":
        changes |= {"mlp_ratio": None, "intermediate_size": 48}
    torch.manual_seed(0)
    return make_tower(**changes)


def make_encoder(name="dinov2", **options):
    return VisionEncoder(tower(name), **options).double().eval()


@pytest.fixture(params=TOWERS)
def encoder(request):
    return make_encoder(request.param)


@pytest.fixture
def frames():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (NUM_FRAMES, 3, SIZE, SIZE), generator=generator).to(torch.uint8)


def queries(encoder, seed=2):
    torch.manual_seed(seed)
    return torch.randn(NUM_FRAMES, encoder.dim, dtype=torch.float64)


def masked_reference(encoder, frames, query, *, sees_itself):
    """The tower's own layers over [query, tokens], the query first, where no position turns it."""
    pixels = encoder.normalise(frames)
    hidden = torch.cat([query[:, None], encoder.tower.embeddings(pixels)], dim=1)
    mask = torch.zeros(hidden.shape[1], hidden.shape[1], dtype=torch.float64)
    mask[:, 0] = -math.inf  # no patch sees the query
    mask[0, 0] = 0.0 if sees_itself else -math.inf
    extra = {}
    if encoder.tower.config.model_type == "dinov3_vit":
        extra = {"position_embeddings": encoder.tower.rope_embeddings(pixels)}
    for layer in encoder.layers:
        hidden = layer(hidden, mask[None, None], **extra)
    return encoder.final_norm(hidden)


def test_patch_stream_equals_the_plain_model(encoder, frames):
    plain = encoder.tower(encoder.normalise(frames)).last_hidden_state
    ours, cache = encoder(frames)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    assert len(cache) == 2
    assert cache[0].key.shape == (NUM_FRAMES, 2, plain.shape[1], 12)


def test_patches_lie_as_in_the_picture_behind_cls_and_registers(encoder, frames):
    """Of frames that are not square: 2 rows of 3 patches."""
    wide = torch.cat([frames, frames[..., :8]], dim=-1)
    plain = encoder.tower(encoder.normalise(wide)).last_hidden_state
    found = encoder.patches(wide)
    assert found.shape == (NUM_FRAMES, encoder.dim, 2, 3)
    first = plain.shape[1] - 6
    for row, column in ((0, 0), (0, 2), (1, 0), (1, 2)):
        torch.testing.assert_close(
            found[:, :, row, column], plain[:, first + 3 * row + column], rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("sees_itself", [False, True])
@pytest.mark.parametrize("name", TOWERS)
def test_query_equals_an_extra_token_that_patches_do_not_see(name, sees_itself, frames):
    encoder = make_encoder(name, sees_itself=sees_itself)
    query = queries(encoder)
    expected = masked_reference(encoder, frames, query, sees_itself=sees_itself)
    ours, cache = encoder(frames)
    torch.testing.assert_close(encoder.look(query, cache), expected[:, 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(ours, expected[:, 1:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("sees_itself", [False, True])
def test_shallow_query_is_one_attention_to_the_last_layer(sees_itself, frames):
    """By hand, head by head: softmax(q K^T / sqrt(d)) V, output projection, final norm."""
    encoder = make_encoder(shallow=True, sees_itself=sees_itself)
    query = queries(encoder)
    _, cache = encoder(frames)
    layer, normed = encoder.layers[-1], encoder.layers[-1].norm1(query)
    q, own_key, own_value = (
        project(normed).unflatten(-1, (2, 12))
        for project in (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj)
    )
    parts = []
    for head in range(2):
        key, value = cache[-1].key[:, head], cache[-1].value[:, head]
        if sees_itself:
            key = torch.cat([key, own_key[:, head, None]], dim=1)
            value = torch.cat([value, own_value[:, head, None]], dim=1)
        weights = (torch.einsum("fd,fpd->fp", q[:, head], key) / math.sqrt(12)).softmax(-1)
        parts.append(torch.einsum("fp,fpd->fd", weights, value))
    expected = encoder.final_norm(layer.attention.o_proj(torch.cat(parts, dim=-1)))
    torch.testing.assert_close(encoder.look(query, cache), expected, rtol=0, atol=1e-12)
    assert encoder.attention(query, cache).shape[:2] == (NUM_FRAMES, 1)


def test_attention_maps_are_probabilities_and_follow_the_query(encoder, frames):
    _, cache = encoder(frames)
    maps = encoder.attention(queries(encoder, 3), cache)
    assert maps.shape == (NUM_FRAMES, 2, 2, cache[0].key.shape[2])
    torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]))
    assert (maps - encoder.attention(queries(encoder, 4), cache)).abs().max() > 1e-3


def test_attention_map_of_the_first_layer_by_hand(encoder, frames):
    _, cache = encoder(frames)
    query = queries(encoder, 4)
    layer = encoder.layers[0]
    q = layer.attention.q_proj(layer.norm1(query))
    head_dim = 12
    for head in range(2):
        part = q[:, head * head_dim : (head + 1) * head_dim]
        scores = torch.einsum("fd,fpd->fp", part, cache[0].key[:, head]) / math.sqrt(head_dim)
        torch.testing.assert_close(
            encoder.attention(query, cache)[:, 0, head], scores.exp() / scores.exp().sum(-1, True)
        )


def train_step(encoder, frames):
    """Loss and gradients of two looks; DINOv3 would draw positions at random while it trains."""
    encoder.train()
    encoder.zero_grad()
    last, cache = encoder(frames)
    looked = encoder.look(encoder.look(last[:, 0], cache), cache)
    loss = looked.square().sum()
    loss.backward()
    return loss, [p.grad.clone() for p in encoder.parameters() if p.grad is not None]


@pytest.mark.parametrize("options", [{}, {"sees_itself": True}, {"shallow": True}])
@pytest.mark.parametrize("name", TOWERS)
def test_gradient_checkpointing_changes_no_gradient(name, options, frames):
    loss, plain = train_step(make_encoder(name, **options), frames)
    lean_loss, lean = train_step(make_encoder(name, gradient_checkpointing=True, **options), frames)
    assert float(lean_loss.detach()) == pytest.approx(float(loss.detach()), abs=1e-10)
    for a, b in zip(plain, lean, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", TOWERS)
def test_gradient_checkpointing_keeps_one_tensor_a_layer(name, frames):
    """Distinct bytes that the backward pass holds on to, weights aside, by saved-tensor hooks."""

    def kept_bytes(encoder):
        encoder.train()
        owned = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
        kept = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in owned:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            last, cache = encoder(frames)
            looked = encoder.look(last[:, 0], cache)
        assert looked.requires_grad
        return sum(kept.values())

    assert kept_bytes(make_encoder(name, gradient_checkpointing=True)) < 0.5 * kept_bytes(
        make_encoder(name)
    )
