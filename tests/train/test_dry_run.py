import resource
from pathlib import Path

import pytest
import yaml

from tests.models import tiny
from tests.train import helpers
from vlm.config import Recipe
from vlm.errors import ConfigError, DataError
from vlm.models import registry
from vlm.train import data
from vlm.train.dry_run import dry_run


def show(recipe: Recipe, capsys: pytest.CaptureFixture[str], world_size: int = 2) -> str:
    assert dry_run(recipe, helpers.resolved(2, world_size)) == 0
    return capsys.readouterr().out


def table_row(output: str, name: str) -> list[str]:
    """Cells of the line of a table that starts with ``name``."""
    (line,) = [line for line in output.splitlines() if line[:1] == "│" and f" {name} " in line]
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_it_shows_the_run_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = helpers.recipe(tmp_path / "run", "model.freeze=[vision]")
    output = show(recipe, capsys)
    shown = yaml.safe_load(output[: output.index(" Parameters")].rpartition("\n")[0])
    assert Recipe.model_validate(shown) == recipe
    assert "steps 6, micro-batches a step 4, ranks 2, accumulation 2" in output
    assert "ZeRO stage 2" in output
    assert not list(tmp_path.iterdir())


def test_parameters_by_component(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = helpers.recipe(tmp_path / "run", "model.freeze=[vision]")
    output = show(recipe, capsys)
    model = registry.build(recipe.model, len(data.load_tokenizer(recipe)), recipe.seed)
    numel = {
        name: sum(p.numel() for p in module.parameters()) for name, module in model.named_children()
    }
    total, trained = sum(numel.values()), numel["connector"] + numel["language"]
    assert table_row(output, "vision") == ["vision", f"{numel['vision']:,}", "0", "frozen"]
    for name, rate in (("connector", "0.002"), ("language", "0.003")):
        assert table_row(output, name) == [name, *[f"{numel[name]:,}"] * 2, rate]
    assert table_row(output, "all") == ["all", f"{total:,}", f"{trained:,}", ""]


def test_the_first_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = helpers.recipe(tmp_path / "run")
    output = show(recipe, capsys)
    tokenizer = data.load_tokenizer(recipe)
    source = data.open_source(recipe, tokenizer, training=True)
    steps = data.steps(source, recipe, 0, 2, data.Position())
    batch = next(steps).batches[0]
    steps.close()
    assert table_row(output, "frames") == ["frames", str(tuple(batch.frames.shape)), "uint8"]
    length = batch.input_ids.numel()
    assert table_row(output, "input_ids") == ["input_ids", f"({length},)", "int64"]
    assert table_row(output, "keys") == ["keys", f"{batch.num_samples} samples", batch.kind]
    sizes = [sum(len(b.rows) for b in step) for step in source.plan.window(0)]
    assert f"samples a step {min(sizes)} to {max(sizes)}" in " ".join(output.split())


def test_other_ranks_are_silent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert show(helpers.recipe(tmp_path / "run"), capsys) == ""


def test_a_model_far_too_large_for_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    language = {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
    }
    recipe = helpers.recipe(
        tmp_path / "run",
        f"model.language.config={language}",
        "model.vision.position_std=1.0",
    )
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    output = show(recipe, capsys)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert grown_kib < 300 * 1024
    # as published for this shape (Llama 3 8B, input and output embeddings apart)
    assert table_row(output, "language")[1] == "8,030,261,248"


def test_pretrained_parts_are_counted_without_their_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.make_tower().save_pretrained(tmp_path / "tower")
    tiny.make_lm().save_pretrained(tmp_path / "lm")
    parts = [
        "model.vision={pretrained: '%s'}" % (tmp_path / "tower"),
        "model.language={pretrained: '%s'}" % (tmp_path / "lm"),
    ]
    recipe = helpers.recipe(tmp_path / "run", *parts)
    model = registry.build(recipe.model, len(data.load_tokenizer(recipe)), recipe.seed)
    for weights in tmp_path.glob("*/model.safetensors"):
        weights.unlink()
    output = show(recipe, capsys)
    for name, module in model.named_children():
        numel = sum(p.numel() for p in module.parameters())
        assert table_row(output, name)[1] == f"{numel:,}", name


def test_mistakes_are_found(tmp_path: Path) -> None:
    recipe = helpers.recipe(tmp_path / "run", "model.vision.config.hidden_sizes=3")
    with pytest.raises(ConfigError, match="hidden_sizes"):
        dry_run(recipe, helpers.resolved(2, 1))
    recipe = helpers.recipe(tmp_path / "run", "model.freeze=[vision, connector, language]")
    with pytest.raises(ConfigError, match="every component"):
        dry_run(recipe, helpers.resolved(2, 1))
    recipe = helpers.recipe(tmp_path / "run", "data.eval=elsewhere.parquet")
    with pytest.raises(DataError, match="elsewhere.parquet: no such file"):
        dry_run(recipe, helpers.resolved(2, 1))
