"""Families that read once, against whole models of transformers, sample by sample."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, CLIPConfig, CLIPModel

from tests.models.reference import check_greedy, check_losses
from tests.models.tiny import CLIP, IMAGE, LANGUAGE, PERCEIVER, make_batch, make_projected
from vlm.config_model import ModelConfig
from vlm.models import registry

SAMPLES = [(3, 7), (1, 12), (0, 6), (2, 4)]
#: family -> placeholders of a frame
PER_FRAME = {"perceiver": 3, "prefix": 4}
each = pytest.mark.parametrize("family", PER_FRAME)


def plain_hidden(model, frames: Tensor, ids: Tensor) -> Tensor:
    """(N, H) by whole models of transformers, for one sample."""
    embeds = model.language.embed(ids).clone()
    at = (ids == IMAGE).nonzero().flatten()
    if len(at):
        tokens = model.vision.tower(model.vision.normalise(frames)).last_hidden_state
        if hasattr(model.vision.tower, "pre_layrnorm"):
            tokens = model.vision.tower.post_layernorm(tokens)
        embeds[at] = model.connector(tokens).flatten(0, 1)
    return model.language.lm.get_decoder()(inputs_embeds=embeds[None]).last_hidden_state[0]


@each
@pytest.mark.parametrize("before", [0, 2], ids=["prepended", "spliced"])
def test_loss_is_that_of_each_sample_alone(family: str, before: int) -> None:
    batch = make_batch(SAMPLES, before=before, per_frame=PER_FRAME[family])
    check_losses(make_projected(family), batch, plain_hidden)


@each
def test_every_parameter_gets_a_gradient_whatever_the_batch_holds(family: str) -> None:
    for samples in (SAMPLES, [(0, 9), (0, 4)]):
        model = make_projected(family)
        model(make_batch(samples, per_frame=PER_FRAME[family])).loss_sum.backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []


@each
def test_generation_equals_forwards_without_a_cache(family: str) -> None:
    model, batch = make_projected(family), make_batch(SAMPLES, per_frame=PER_FRAME[family])
    check_greedy(model, batch, plain_hidden, 4)


@each
def test_a_saved_model_is_the_same(family: str, tmp_path: Path) -> None:
    model = make_projected(family).float()
    batch = make_batch(SAMPLES, per_frame=PER_FRAME[family])
    model.save_pretrained(tmp_path)
    for loaded in (registry.load(tmp_path).eval(), AutoModel.from_pretrained(tmp_path).eval()):
        assert type(loaded) is type(model)
        assert torch.equal(loaded(batch).loss_sum, model(batch).loss_sum)


def test_a_tower_is_taken_out_of_a_checkpoint_of_image_and_text(tmp_path: Path) -> None:
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30}
    vision = {k: v for k, v in CLIP.items() if k != "model_type"}
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    whole.save_pretrained(tmp_path)
    config = ModelConfig.model_validate(
        {
            "family": "perceiver",
            "vision": {"pretrained": str(tmp_path)},
            "language": {"config": LANGUAGE},
            "connector": PERCEIVER,
            "tokenizer": "unused",
        }
    )
    found = registry.build(config, 50, 0).vision.tower.state_dict()
    expected = whole.vision_model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
