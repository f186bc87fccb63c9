"""From a recipe to a model and back from disk, with tiny parts saved as transformers saves them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from tests.models.tiny import (
    LANGUAGE,
    VISION,
    VOCAB,
    make_batch,
    make_lm,
    make_model,
    make_tower,
)
from vlm import config
from vlm.config_model import CONNECTORS, Family, ModelConfig
from vlm.errors import CheckpointError, ConfigError, one_line
from vlm.models import registry
from vlm.models.foveated import MODES, FoveatedModel

ABLATIONS = Path(__file__).parents[2] / "recipes" / "ablations"
SMALL_VISION = {
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "image_size": 518,
    "patch_size": 14,
}
SMALL_LANGUAGE = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49_152,
    "tie_word_embeddings": True,
}


def recipe(
    vision: dict[str, Any] | None = None, language: dict[str, Any] | None = None, **changes: Any
) -> ModelConfig:
    values = {
        "family": "foveated",
        "vision": vision or {"config": VISION},
        "language": language or {"config": LANGUAGE},
        "connector": {"query_dim": 20},
        "tokenizer": "unused",
    }
    return ModelConfig.model_validate(values | changes)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower and a language model on disk, the latter in bfloat16 as such models often are."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(5)
    make_tower().save_pretrained(folder / "tower")
    make_lm(vocab_size=40).bfloat16().save_pretrained(folder / "lm")
    return folder


def pretrained(parts: Path, **changes: Any) -> ModelConfig:
    return recipe(
        vision={"pretrained": str(parts / "tower")},
        language={"pretrained": str(parts / "lm")},
        **changes,
    )


def test_the_seed_decides_every_weight() -> None:
    one, same, other = (registry.build(recipe(), VOCAB, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["connector.q_init.weight"], other["connector.q_init.weight"])
    name = "language.lm.model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(one[name], other[name])


def test_the_vocabulary_holds_every_token() -> None:
    for vocab_size, expected in ((VOCAB + 14, VOCAB + 14), (VOCAB - 10, VOCAB)):
        lm = registry.build(recipe(), vocab_size, 0).language.lm
        assert lm.get_input_embeddings().num_embeddings == expected == lm.config.vocab_size
        assert lm.get_output_embeddings().out_features == expected


def test_pretrained_parts_keep_their_weights_in_float32(parts: Path) -> None:
    model = registry.build(pretrained(parts), VOCAB, 0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.manual_seed(5)
    tower = make_tower().state_dict()
    assert all(torch.equal(model.vision.tower.state_dict()[n], w) for n, w in tower.items())
    stored = load_file(parts / "lm" / "model.safetensors")
    found = model.language.lm.state_dict()
    assert stored.keys() <= found.keys()
    for name, weight in stored.items():
        assert torch.equal(found[name][: len(weight)], weight.float())
    lm = model.language.lm
    assert lm.get_input_embeddings().num_embeddings == VOCAB
    assert lm.get_input_embeddings().weight is lm.get_output_embeddings().weight
    assert model(make_batch([(2, 5), (0, 4)])).loss_sum.isfinite()


def test_transformers_keeps_quiet(
    parts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    registry.build(pretrained(parts), VOCAB, 0)
    make_model().save_pretrained(tmp_path)
    capfd.readouterr()
    registry.build(pretrained(parts), VOCAB, 0)
    registry.load(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_nothing_is_loaded_on_the_meta_device(parts: Path) -> None:
    with torch.device("meta"):
        model = registry.build(pretrained(parts), VOCAB, 0)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    real = registry.build(pretrained(parts), VOCAB, 0)
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in real.named_parameters()
    }


def test_the_small_model_has_the_published_size() -> None:
    """DINOv2-small and SmolLM2-135M: 157.6 M, of which the connector has .59 M + .148 M."""
    config = recipe({"config": SMALL_VISION}, {"config": SMALL_LANGUAGE}, connector={})
    with torch.device("meta"):
        model = registry.build(config, 49_152, 0)
    counts = {
        name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()
    }
    width, layers, hidden, kv, ffn = 384, 12, 576, 192, 1536
    block = 12 * width * width + 13 * width + 2 * width  # attention, MLP, norms; two layer scales
    embeddings = 3 * 14 * 14 * width + width + (37 * 37 + 1) * width + 2 * width
    assert counts["vision"] == layers * block + embeddings + 2 * width
    block = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * ffn + 2 * hidden
    assert counts["language"] == 30 * block + 49_152 * hidden + hidden
    output_proj = sum(p.numel() for p in model.connector.output_proj.parameters())
    assert output_proj == width * width + width == pytest.approx(0.148e6, rel=0.002)
    assert counts["connector"] - output_proj == pytest.approx(0.59e6, rel=0.01)
    assert sum(counts.values()) == pytest.approx(157.6e6, rel=0.002)


def test_positions_are_as_far_apart_as_the_recipe_says() -> None:
    plain = registry.build(recipe({"config": VISION}), VOCAB, 0).vision.tower.embeddings
    config = recipe({"config": VISION, "position_std": 5.0})
    spread = registry.build(config, VOCAB, 0).vision.tower.embeddings
    assert plain.position_embeddings.detach().std() < 1
    assert spread.position_embeddings.detach().std() == pytest.approx(5.0, rel=0.3)
    assert torch.equal(spread.cls_token, plain.cls_token)


def test_options_of_the_looks_reach_the_tower() -> None:
    """Each changes the loss, and survives a checkpoint."""
    batch, losses = make_batch([(3, 5)]), set()
    for options in ({}, {"shallow": True}, {"sees_itself": True}, {"fine_passes": 2}):
        model = registry.build(recipe(connector={"query_dim": 20, **options}), VOCAB, 0)
        assert options.items() <= model.config.connector.items()
        losses.add(float(model(batch).loss_sum.detach()))
    assert len(losses) == 4


@pytest.mark.parametrize(
    ("family", "connector", "per_frame", "parts"),
    [
        ("multi_token", {"tokens_per_frame": 4}, 4, {"vision", "language", "connector"}),
        ("blind", {}, 0, {"language"}),
    ],
)
def test_baselines_are_families_of_a_recipe(
    family: str, connector: dict[str, Any], per_frame: int, parts: set[str]
) -> None:
    freeze = [] if "vision" in parts else ["vision", "connector"]
    config = recipe(family=family, connector=connector, freeze=freeze)
    assert config.connector.tokens_per_frame == per_frame
    model = registry.build(config, VOCAB, 0)
    assert {name for name, _ in model.named_children()} == parts
    batch = make_batch([(3, 5), (0, 4)], per_frame=per_frame)
    assert batch.has_frames == (per_frame > 0)
    assert model(batch).loss_sum.isfinite()


@pytest.mark.parametrize("name", sorted(p.stem for p in ABLATIONS.glob("*.yaml")))
def test_ablations_are_small_overlays_that_can_be_built(name: str) -> None:
    path = ABLATIONS / f"{name}.yaml"
    found = config.load(path)
    assert found.name == f"quickstart_{name}" and len(path.read_text().splitlines()) < 15
    with torch.device("meta"):
        model = registry.build(found.model, VOCAB, 0)
    assert set(found.train.modes) <= set(model.train_modes)


def test_every_family_of_a_recipe_can_be_built() -> None:
    assert registry.FAMILIES.keys() == CONNECTORS.keys() == set(get_args(Family))


def test_building_leaves_the_recipe_alone() -> None:
    scaled = {"rope_type": "linear", "factor": 2.0}
    config = recipe(language={"config": LANGUAGE | {"rope_parameters": scaled}})
    before = config.model_dump_json()
    registry.build(config, VOCAB, 0)
    assert config.model_dump_json() == before


def test_gradient_checkpointing_reaches_both_parts() -> None:
    plain = registry.build(recipe(), VOCAB, 0)
    config = recipe(
        {"config": VISION, "gradient_checkpointing": True},
        {"config": LANGUAGE, "gradient_checkpointing": True},
    )
    model = registry.build(config, VOCAB, 0)
    assert model.vision.gradient_checkpointing and model.language.lm.model.gradient_checkpointing
    for one in (plain, model):
        one.train()(make_batch([(3, 5), (1, 8)])).loss_sum.backward()
    for expected, found in zip(plain.parameters(), model.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad)


# --- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"vision": {"config": VISION | {"hiden_size": 3}}},
            "model.vision.config: unknown keys for dinov2: hiden_size (did you mean hidden_size?)",
        ),
        (
            {"language": {"config": LANGUAGE | {"rope_theta": 1e5, "layers": 2}}},
            "model.language.config: unknown keys for llama: layers, rope_theta",
        ),
        ({"vision": {"config": {"model_type": "dinov9"}}}, "model.vision.config: "),
        ({"vision": {"config": {"model_type": "vit"}}}, "model.vision: found model_type 'vit'"),
        ({"language": {"config": {"model_type": "dinov2"}}}, "model.language: found model_type"),
        ({"vision": {"config": VISION | {"hidden_size": "wide"}}}, "expected int, got str"),
        ({"vision": {"config": VISION | {"hidden_size": 25}}}, "hidden_size 25"),
        ({"vision": {"config": VISION | {"num_attention_heads": 0}}}, "num_attention_heads 0"),
        ({"language": {"config": LANGUAGE | {"hidden_size": 30}}}, "hidden size (30)"),
        ({"language": {"config": LANGUAGE | {"hidden_act": "relux"}}}, "relux"),
        ({"vision": {"pretrained": "/nowhere/tower"}}, "model.vision.pretrained '/nowhere/tower'"),
    ],
)
def test_what_cannot_be_built_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        registry.build(recipe(**changes), VOCAB, 0)
    assert said in str(caught.value)
    assert len(one_line(caught.value)) < 500


def test_rotary_positions_have_no_std() -> None:
    vision = {"model_type": "dinov3_vit", "hidden_size": 24, "num_attention_heads": 2}
    with pytest.raises(ConfigError, match="position_std: a dinov3_vit tower has rotary positions"):
        registry.build(recipe({"config": vision, "position_std": 1.0}), VOCAB, 0)


def test_pretrained_positions_are_not_replaced(parts: Path) -> None:
    vision = {"pretrained": str(parts / "tower"), "position_std": 1.0}
    with pytest.raises(ConfigError, match="position_std: pretrained weights bring their own"):
        registry.build(recipe(vision), VOCAB, 0)


def test_a_part_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    """transformers would start them at random, with a warning among many."""
    make_lm().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="1 weights of LlamaForCausalLM .* model.norm.weight"):
        registry.build(recipe(language={"pretrained": str(tmp_path)}), VOCAB, 0)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    lm = make_lm()
    lm.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(lm.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="no file named model.safetensors"):
        registry.build(recipe(language={"pretrained": str(tmp_path)}), VOCAB, 0)


# --- saved models -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FoveatedModel, Path]]:
    path = tmp_path_factory.mktemp("saved")
    model = make_model().float()
    model.save_pretrained(path)
    yield model, path


def test_a_saved_model_loads_with_equal_losses(saved: tuple[FoveatedModel, Path]) -> None:
    model, path = saved
    batch = make_batch([(3, 7), (1, 12), (0, 4)])
    loaded = registry.load(path).eval()
    auto = AutoModel.from_pretrained(path).eval()
    assert type(auto) is type(loaded) is FoveatedModel
    for mode in MODES:
        expected = model(batch, mode=mode).loss_sum
        assert torch.equal(loaded(batch, mode=mode).loss_sum, expected)
        assert torch.equal(auto(batch, mode=mode).loss_sum, expected)


def test_tied_embeddings_stay_tied_and_are_stored_once(saved: tuple[FoveatedModel, Path]) -> None:
    _, path = saved
    lm = registry.load(path).language.lm
    assert lm.get_input_embeddings().weight is lm.get_output_embeddings().weight
    names = set(load_file(path / "model.safetensors"))
    assert {"language.lm.model.embed_tokens.weight", "language.lm.lm_head.weight"} & names == {
        "language.lm.model.embed_tokens.weight"
    }


def test_a_bfloat16_model_stays_one(tmp_path: Path) -> None:
    model = make_model().bfloat16()
    model.save_pretrained(tmp_path)
    loaded = registry.load(tmp_path).eval()
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    batch = make_batch([(3, 7), (0, 4)])
    assert torch.equal(loaded(batch).loss_sum, model(batch).loss_sum)


def test_the_parts_of_a_recipe_survive(parts: Path, tmp_path: Path) -> None:
    model = registry.build(pretrained(parts), VOCAB, 3)
    model.save_pretrained(tmp_path)
    loaded = registry.load(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[n], w) for n, w in model.state_dict().items())
    assert AutoConfig.from_pretrained(tmp_path).connector == model.config.connector


def test_what_cannot_be_loaded_is_named(
    saved: tuple[FoveatedModel, Path], parts: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="no config.json there"):
        registry.load(tmp_path)
    with pytest.raises(CheckpointError, match="found a llama model, expected one of saccade_"):
        registry.load(parts / "lm")
    _, path = saved
    config = (path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config[: len(config) // 2])
    with pytest.raises(CheckpointError, match="not a valid JSON"):
        registry.load(tmp_path)
    (tmp_path / "config.json").write_text(config)
    weights = (path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match=f"{tmp_path.name}: SafetensorError"):
        registry.load(tmp_path)
    less = load_file(path / "model.safetensors")
    del less["connector.q_init.weight"]
    save_file(less, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="do not fit: .*missing_keys.*q_init"):
        registry.load(tmp_path)
