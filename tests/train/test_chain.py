"""A stage that starts from another one's weights."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.engine import engines
from tests.models import adapted, tiny
from tests.train import helpers
from vlm.ckpt.save import MODEL
from vlm.errors import ConfigError
from vlm.models import export, registry
from vlm.train import chain, data, run
from vlm.train.preempt import Preemption


@pytest.fixture
def stage1(tmp_path: Path) -> Path:
    """A run folder whose best checkpoint is not its newest."""
    folder = tmp_path / "stage1"
    for step, seed in ((100, 11), (200, 12)):
        checkpoint = folder / "checkpoints" / f"step_{step:08d}"
        tiny.make_model(seed=seed).save_pretrained(checkpoint / MODEL)
        (checkpoint / "COMPLETE").touch()
    (folder / "checkpoints" / "best").write_text("step_00000100")
    return folder


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(s, t) for (a, s), (b, t) in pairs)


def test_a_run_gives_its_best_checkpoint(stage1: Path) -> None:
    model = tiny.make_model(seed=1)
    chain.load_weights(model, stage1)
    assert same(model, tiny.make_model(seed=11))


def test_a_checkpoint_can_be_named(stage1: Path) -> None:
    for name in ("step_00000200", f"step_00000200/{MODEL}"):
        model = tiny.make_model(seed=1)
        chain.load_weights(model, stage1 / "checkpoints" / name)
        assert same(model, tiny.make_model(seed=12))


def test_adapters_are_added_to_what_was_trained_without(stage1: Path) -> None:
    model = engines.make_lora_model()
    before = {n: t.clone() for n, t in model.state_dict().items() if "lora_" in n}
    chain.load_weights(model, stage1)
    after = model.state_dict()
    assert before and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    source = tiny.make_model(seed=11).state_dict()
    name = "language.lm.model.layers.0.self_attn.q_proj.weight"
    wrapped = "language.lm.base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    assert torch.equal(after[wrapped], source[name])


def test_stage_2_on_4_bits_takes_the_connector_of_stage_1(tmp_path: Path) -> None:
    """And refuses a language model that stage 1 has changed: it would be lost without a word."""
    base = adapted.write_base(tmp_path / "base")
    first = adapted.trained(adapted.recipe(base, None, freeze=["vision", "language"]))
    first.save_pretrained(tmp_path / "first")
    second = registry.build(adapted.recipe(base, adapted.LORA, "nf4"), tiny.VOCAB, 5)
    chain.load_weights(second, tmp_path / "first")
    assert same(second.connector, first.connector) and same(second.vision, first.vision)
    with torch.no_grad():
        first.language.lm.model.layers[1].mlp.up_proj.weight[3] *= 1.5
    first.save_pretrained(tmp_path / "changed")
    with pytest.raises(ConfigError, match="up_proj.*packed from other weights than were trained"):
        chain.load_weights(second, tmp_path / "changed")


def test_a_third_stage_goes_on_with_the_adapters(tmp_path: Path) -> None:
    config = adapted.recipe(adapted.write_base(tmp_path / "base"), adapted.LORA, "nf4")
    second = adapted.trained(config)
    export.save(second, second.state_dict(), tmp_path / "second")
    third = registry.build(config, tiny.VOCAB, 5)
    chain.load_weights(third, tmp_path / "second")
    assert same(third, second)


def test_what_is_not_there_is_refused(stage1: Path, tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "nothing", "found no run, checkpoint or exported model; finish that stage"),
        (tmp_path, "found no run"),
    ):
        with pytest.raises(ConfigError, match=message):
            chain.load_weights(tiny.make_model(), path)
    (stage1 / "checkpoints" / "step_00000100" / "COMPLETE").unlink()
    with pytest.raises(ConfigError, match="was never finished"):
        chain.load_weights(tiny.make_model(), stage1)
    (stage1 / "checkpoints" / "best").write_text("../../elsewhere")
    with pytest.raises(ConfigError, match="expected one checkpoint"):
        chain.load_weights(tiny.make_model(), stage1)
    (stage1 / "checkpoints" / "best").unlink()
    with pytest.raises(ConfigError, match="no best checkpoint.*was evaluated"):
        chain.load_weights(tiny.make_model(), stage1)


def test_another_model_is_refused(stage1: Path) -> None:
    model = tiny.make_model()
    model.connector.q_init.weight = nn.Parameter(torch.zeros(1, 99))
    model.language.extra = nn.Linear(2, 2)
    with pytest.raises(
        ConfigError, match=r"connector.q_init.weight is \(1, 99\), found \(1, \d+\)"
    ):
        chain.load_weights(model, stage1)


def test_a_run_starts_from_it_and_refuses_to_start_without(tmp_path: Path) -> None:
    """Before any engine is made."""
    recipe = helpers.recipe(tmp_path / "run", f"model.init_from={tmp_path / 'gone'}")
    machine = run.Machine(torch.device("cpu"), 0, 1)
    with pytest.raises(ConfigError, match=r"model\.init_from .*gone: found no run"):
        run.build_run(recipe, helpers.resolved(2, 1), machine, Preemption())
    assert data.load_tokenizer(recipe)  # the refusal was not about anything else
