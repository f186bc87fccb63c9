"""Sizes and gradients of maps and layers, worked out by hand. See test_flops for whole models."""

import peft
import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.models import tiny
from vlm.errors import ConfigError
from vlm.models.flops.layers import Flops, attend, decoder_layers, linear_map


def test_a_map_and_what_of_it_asks_for_a_gradient() -> None:
    for module in (nn.Linear(6, 10), Conv1D(10, 6)):
        one = linear_map(module)
        flops = Flops()
        assert one.run(flops, 7, grad=False)
        assert (flops.forward, flops.backward) == (2 * 7 * 60, 2 * 7 * 60)  # weights only
        assert one.backward(7, grad=True) == 2 * 2 * 7 * 60
        frozen = linear_map(module.requires_grad_(False))
        assert not frozen.run(flops, 7, grad=False)
        assert frozen.backward(7, grad=False) == 0
        assert frozen.backward(7, grad=True) == 2 * 7 * 60


def test_adapters_beside_a_frozen_map() -> None:
    lm = tiny.make_lm()
    adapted = peft.get_peft_model(lm, peft.LoraConfig(r=2, target_modules=["k_proj"]))
    layer = adapted.get_decoder().layers[0]
    one = linear_map(layer.self_attn.k_proj)
    assert (one.base, one.down, one.up) == (32 * 16, 32 * 2, 2 * 16)
    assert one.trains and not one.base_trains
    # A's weights; B's weights and its input, which A made
    assert one.backward(5, grad=False) == 2 * 5 * (64 + 2 * 32)
    assert one.backward(5, grad=True) == 2 * 5 * (512 + 2 * 64 + 2 * 32)


def test_attention_takes_gradients_of_what_asks_for_them() -> None:
    for grads, products in [((True,) * 3, 4), ((True, False, False), 2), ((False,) * 3, 0)]:
        flops = Flops()
        assert attend(flops, 100, 8, grads) == any(grads)
        assert flops == Flops(forward=4 * 100 * 8, backward=2 * 100 * 8 * products)


def test_layers_of_a_language_model() -> None:
    first, second = decoder_layers(tiny.make_lm().get_decoder())
    assert first == second
    query, key, value = first.attention.inner
    assert (query.base, key.base, value.base) == (32 * 32, 32 * 16, 32 * 16)
    (mlp,) = first.mlps
    assert [one.base for one in mlp.inner] == [32 * 48] * 2 and mlp.outer.base == 48 * 32
    flops = Flops()
    first.run(flops, tokens=3, pairs=9, grad=True, recomputed=True)
    assert flops.recompute == flops.forward - 2 * 3 * mlp.outer.base


def test_layers_that_nobody_could_count_are_refused() -> None:
    with pytest.raises(ConfigError, match="found linear maps in mlp"):
        layer = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))})
        decoder_layers(nn.ModuleDict({"layers": nn.ModuleList([layer])}))
    with pytest.raises(ConfigError, match="no list of layers"):
        decoder_layers(nn.Linear(3, 3))
