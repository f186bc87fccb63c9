"""Adapters by model type, against counts by hand; 4-bit weights against bitsandbytes' own."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models.adapted import LORA, recipe, trained, write_base
from tests.models.tiny import VOCAB, make_batch
from vlm.config_model import LoraConfig
from vlm.engine import optim
from vlm.engine.low_bit import is_packed
from vlm.errors import ConfigError
from vlm.models import adapters, registry

SMALL = {
    "llama": ("hidden_size", "num_hidden_layers", "num_attention_heads"),
    "mistral": ("hidden_size", "num_hidden_layers", "num_attention_heads"),
    "qwen2": ("hidden_size", "num_hidden_layers", "num_attention_heads"),
    "qwen3": ("hidden_size", "num_hidden_layers", "num_attention_heads"),
    "gemma2": ("hidden_size", "num_hidden_layers", "num_attention_heads"),
    "phi": ("hidden_size", "num_hidden_layers", "num_attention_heads"),
    "phi3": ("hidden_size", "num_hidden_layers", "num_attention_heads"),
    "gpt2": ("n_embd", "n_layer", "n_head"),
    "opt": ("hidden_size", "num_hidden_layers", "num_attention_heads"),
}


def small_lm(kind: str):
    values = dict(zip(SMALL[kind], (32, 2, 4), strict=True))
    if kind == "phi3":
        values |= {"pad_token_id": 0}
    config = AutoConfig.for_model(kind, vocab_size=40, **values)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", adapters.TARGETS)
def test_targets_follow_from_the_model_type_and_can_be_named(kind: str) -> None:
    lm = adapters.add_lora(small_lm(kind), LoraConfig(rank=3))
    adapted = {n.partition(".lora_A")[0] for n, _ in lm.named_parameters() if ".lora_A" in n}
    assert {name.rpartition(".")[2] for name in adapted} == set(adapters.TARGETS[kind])
    assert all(p.requires_grad == ("lora_" in n) for n, p in lm.named_parameters())
    one = adapters.TARGETS[kind][0]
    named = adapters.add_lora(small_lm(kind), LoraConfig(targets=(one,)))
    found = {
        n.split(".lora_A")[0].rpartition(".")[2]
        for n, _ in named.named_parameters()
        if ".lora_A" in n
    }
    assert found == {one}


def test_what_cannot_be_adapted_is_refused() -> None:
    with pytest.raises(ConfigError, match="found qkv, but this llama model has no such modules"):
        adapters.add_lora(small_lm("llama"), LoraConfig(targets=("qkv", "q_proj")))
    lm = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "gpt_neox",
            hidden_size=16,
            num_hidden_layers=1,
            vocab_size=9,
            num_attention_heads=2,
            intermediate_size=8,
        )
    )
    with pytest.raises(ConfigError, match="none are known for model_type 'gpt_neox'"):
        adapters.add_lora(lm, LoraConfig())


def test_the_scale_is_alpha_over_rank(tmp_path: Path) -> None:
    """LLaMA-3 with rank 64 and alpha 16: .25."""
    model = trained(recipe(write_base(tmp_path), {"rank": 64, "alpha": 16}))
    layer = model.language.lm.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(5, 64)
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    expected = x @ layer.base_layer.weight.T + 0.25 * (x @ down.T @ up.T)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_stage_2_trains_connector_and_adapters(tmp_path: Path) -> None:
    config = recipe(write_base(tmp_path))
    model = registry.build(config, VOCAB, 0)
    optim.freeze(model, config)
    found = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = {
        name
        for name, _ in model.named_parameters()
        if name.startswith("connector.") or ("lora_" in name and name.startswith("language."))
    }
    assert found == expected
    assert len([n for n in found if "lora_A" in n]) == 7 * 2


@pytest.mark.parametrize(
    ("lora", "quantize", "frozen"),
    [(None, "nf4", ["vision", "language"]), (LORA, None, ["vision"]), (LORA, "nf4", ["vision"])],
    ids=["4 bits", "adapters", "both"],
)
def test_adapters_and_4_bits_are_independent(tmp_path: Path, lora, quantize, frozen) -> None:
    """Each alone and both together: a backward pass reaches what trains and nothing else."""
    config = recipe(write_base(tmp_path), lora, quantize, freeze=frozen)
    model = registry.build(config, VOCAB, 0)
    optim.freeze(model, config)
    packed = [name for name, p in model.named_parameters() if is_packed(p)]
    assert len(packed) == (14 if quantize else 0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch, losses = make_batch([(2, 6), (1, 9)], per_frame=3), []
    for _ in range(8):
        loss = model(batch).loss_sum
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}


def test_4_bit_weights_are_nf4_with_quantised_scales_stored_as_bytes(tmp_path: Path) -> None:
    import bitsandbytes

    base = write_base(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(base)
    model = registry.build(recipe(base, None, "nf4", freeze=["language"]), VOCAB, 0)
    layer = model.language.lm.model.layers[0].mlp.up_proj
    state = layer.weight.quant_state
    assert (state.quant_type, state.nested, state.blocksize) == ("nf4", True, 64)
    assert layer.compute_dtype == torch.bfloat16 and layer.weight.dtype == torch.uint8
    unpacked = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)
    exact = plain.model.layers[0].mlp.up_proj.weight.detach()
    # the widest gap of NF4's 16 levels is 0.28 of a block's largest weight
    assert float((unpacked - exact).abs().max()) <= 0.16 * float(exact.abs().max())
    assert isinstance(model.language.lm.lm_head, nn.Linear)
    assert not is_packed(model.language.lm.lm_head.weight)


def test_on_the_meta_device_nothing_is_packed_and_the_counts_are_true(tmp_path: Path) -> None:
    config = recipe(write_base(tmp_path), quantize="nf4")
    with torch.device("meta"):
        shapes = registry.build(config, VOCAB, 0)
    real = registry.build(config, VOCAB, 0)
    assert optim.freeze(shapes, config) == optim.freeze(real, config)


def test_adapters_and_4_bits_need_a_base() -> None:
    for extra in ({"lora": {}}, {"quantize": "nf4"}):
        with pytest.raises(ValueError, match="needs `pretrained`"):
            recipe(Path("x")).model_validate(
                recipe(Path("x")).model_dump()
                | {"language": {"config": {"model_type": "llama"}} | extra}
            )


def test_4_bits_without_bitsandbytes_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="nf4 needs bitsandbytes.*pip install"):
        adapters.nf4_options()


def test_the_last_layers_of_a_tower_can_train_alone(tmp_path: Path) -> None:
    base = write_base(tmp_path)
    vision = recipe(base).vision.model_copy(update={"train_last": 1})
    config = recipe(base, freeze=[]).model_copy(update={"vision": vision})
    model = registry.build(config, VOCAB, 0)
    optim.freeze(model, config)
    found = {n for n, p in model.vision.named_parameters() if p.requires_grad}
    assert found and all(name.startswith("tower.encoder.layers.1.") for name in found)
    many = config.model_copy(update={"vision": vision.model_copy(update={"train_last": 3})})
    with pytest.raises(ConfigError, match="train_last: found 3, but the tower has 2 layers"):
        optim.freeze(model, many)
