"""Exports with adapters: read by ``peft`` alone, by us, and merged; nothing trained is lost."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from tests.models.adapted import LORA, recipe, trained, write_base
from tests.models.tiny import make_baseline, make_batch
from vlm.errors import CheckpointError
from vlm.models import export, registry

BATCH = make_batch([(2, 6), (0, 4), (1, 9)], per_frame=3)
CASES = pytest.mark.parametrize("quantize", [None, "nf4"], ids=["float", "4 bits"])


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.language.logits(model.language(model.embed(BATCH), BATCH))


def exported(folder: Path, quantize: str | None = None, vocab_size: int = 50):
    """A model with two rows more than its base, and its export."""
    config = recipe(write_base(folder / "base"), LORA, quantize)
    model = trained(config, vocab_size + 2)
    export.save(model, model.state_dict(), folder / "model")
    return model, folder / "model"


@CASES
def test_a_loaded_export_is_the_same_model(tmp_path: Path, quantize: str | None) -> None:
    model, path = exported(tmp_path, quantize)
    loaded = registry.load(path).eval()
    assert torch.equal(logits(loaded), logits(model))
    names = [name for name, _ in loaded.named_parameters()]
    assert names == [name for name, _ in model.named_parameters()]


def test_it_holds_what_trained_and_not_the_base(tmp_path: Path) -> None:
    model, path = exported(tmp_path)
    files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert files >= {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "config.json",
        "model.safetensors",
    }
    held = load_file(path / "model.safetensors")
    assert {name.partition(".")[0] for name in held} == {"vision", "connector"}
    adapter = load_file(path / "adapter" / "adapter_model.safetensors")
    assert adapter and all("lora_" in name for name in adapter)
    named = json.loads((path / "config.json").read_text())["base"]
    assert named == {"pretrained": str(tmp_path / "base"), "quantize": None, "vocab_size": 52}


def test_peft_alone_loads_the_adapter(tmp_path: Path) -> None:
    model, path = exported(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, path / "adapter").eval()
    ids = torch.randint(4, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        found = model.language.lm(input_ids=ids).logits[..., :50]  # rows that were added
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")(input_ids=ids).logits
    torch.testing.assert_close(found, expected)
    # the adapter names its base, so that nothing else need be known
    alone = peft.AutoPeftModelForCausalLM.from_pretrained(path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(alone(input_ids=ids).logits, expected)
    assert float((plain - expected).abs().max()) > 0.1


@CASES
def test_merged_it_answers_as_before_without_peft(tmp_path: Path, quantize: str | None) -> None:
    model, path = exported(tmp_path, quantize)
    merged = registry.load(path, packed=False).eval()
    export.merge(merged)
    merged.save_pretrained(tmp_path / "merged")
    for whole in (
        registry.load(tmp_path / "merged").eval(),
        AutoModel.from_pretrained(tmp_path / "merged").eval(),
    ):
        assert not [n for n, _ in whole.named_parameters() if "lora_" in n]
        # 4-bit layers compute in bfloat16, the merged ones in float32
        error = (logits(whole) - logits(model)).abs()
        if quantize:
            assert float(error.mean()) < 0.02 * float(logits(model).std())
        else:
            assert float(error.max()) < 1e-4


@CASES
def test_a_merge_drops_nothing_that_was_trained(tmp_path: Path, quantize: str | None) -> None:
    """Every trained tensor changes the merged model, and each other part is carried over."""
    model, path = exported(tmp_path, quantize)
    merged = registry.load(path, packed=False)
    export.merge(merged)
    own, found = model.state_dict(), merged.state_dict()
    for name in own:
        if name.startswith(("connector.", "vision.")):
            assert torch.equal(found[name], own[name]), name
    plain = registry.load(path, packed=False).language.lm.base_model.model.state_dict()
    for name, before in plain.items():
        if "base_layer" in name:
            after = found["language.lm." + name.replace(".base_layer", "")]
            assert not torch.equal(after, before), name


def test_a_part_that_is_missing_is_no_random_one(tmp_path: Path) -> None:
    _, path = exported(tmp_path)
    with pytest.raises(CheckpointError, match="holds adapters of .*base and not that model"):
        AutoModel.from_pretrained(path)
    held = load_file(path / "model.safetensors")
    held.pop("connector.latents")
    save_file(held, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="the weights do not fit: 1 are.*connector.latents"):
        registry.load(path)


def test_adapters_that_are_missing_are_no_untrained_ones(tmp_path: Path) -> None:
    _, path = exported(tmp_path)
    file = path / "adapter/adapter_model.safetensors"
    held = load_file(file)
    name, _ = held.popitem()
    save_file(held, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"the weights do not fit: 1 are.*{name}"):
        registry.load(path)
    shutil.rmtree(path / "adapter")
    with pytest.raises(CheckpointError, match="No such file.*adapter_model"):
        registry.load(path)


def test_every_tensor_of_an_export_has_its_name_in_the_model(tmp_path: Path) -> None:
    model, path = exported(tmp_path)
    names = {
        export.model_name(file, name)
        for file in path.rglob("*.safetensors")
        for name in load_file(file)
    }
    trained_names = {n for n, _ in model.named_parameters() if "lora_" in n or "connector" in n}
    assert trained_names <= names <= set(model.state_dict())


def test_a_part_can_be_written_alone(tmp_path: Path) -> None:
    """The merged language model, as transformers loads it without us."""
    model, path = exported(tmp_path)
    merged = registry.load(path, packed=False)
    export.merge(merged)
    export.part(merged, "language").save_pretrained(tmp_path / "language")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "language").eval()
    ids = torch.randint(4, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.language.lm(input_ids=ids).logits
        torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert export.part(merged, None) is merged
    assert export.part(merged, "vision") is merged.vision.tower
    with pytest.raises(CheckpointError, match="saccade_blind model has no vision to write"):
        export.part(make_baseline(), "vision")
