"""Against transformers' ``VisionEncoderDecoderModel`` with the same weights."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, VisionEncoderDecoderModel

from tests.models.reference import sample
from tests.models.tiny import CLIP, make_batch
from vlm.config_model import ModelConfig
from vlm.errors import ConfigError
from vlm.models import registry
from vlm.models.generate import generate

VIT = {k: v for k, v in CLIP.items() if k != "initializer_factor"} | {
    "model_type": "vit",
    "initializer_range": 0.3,
}
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 50,
    "initializer_range": 0.3,
    "n_positions": 64,
}
SAMPLES = [(1, 7), (2, 12), (1, 6), (3, 4)]


def recipe(vision=None, language=None) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "family": "cross_attention",
            "vision": vision or {"config": VIT},
            "language": language or {"config": GPT2},
            "connector": {},
            "tokenizer": "unused",
        }
    )


def make():
    return registry.build(recipe(), 50, 0).double().eval()


def reference(model) -> VisionEncoderDecoderModel:
    """It shares our modules; its own tower returns what ours does."""
    whole = VisionEncoderDecoderModel(encoder=model.vision.tower, decoder=model.language.lm)
    whole.enc_to_dec_proj = model.connector
    return whole.double().eval()


def their_logits(model, frames: Tensor, ids: Tensor) -> Tensor:
    """(N, V) for one sample; its frames' tokens lie one after another."""
    whole = reference(model)
    states = whole.encoder(model.vision.normalise(frames)).last_hidden_state.flatten(0, 1)[None]
    out = whole(encoder_outputs=(states,), decoder_input_ids=ids[None])
    return out.logits[0]


def test_loss_is_that_of_each_sample_alone() -> None:
    model, batch = make(), make_batch(SAMPLES, per_frame=0)
    expected = 0.0
    for index in range(batch.num_samples):
        frames, ids, labels = sample(batch, index)
        logits = their_logits(model, frames, ids).detach()
        expected += float(F.cross_entropy(logits[:-1], labels[1:], reduction="sum"))
    assert float(model(batch).loss_sum.detach()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_equals_forwards_and_their_beam_search(num_beams: int) -> None:
    model, batch = make(), make_batch(SAMPLES, per_frame=0)
    options = {"max_new_tokens": 5, "num_beams": num_beams}
    found = generate(model, batch, eos_token_id=49, **options)
    for index, new in enumerate(found):
        frames, ids, _ = sample(batch, index)
        states = model.vision.tower(model.vision.normalise(frames)).last_hidden_state
        theirs = model.language.lm.generate(
            input_ids=ids[None],
            attention_mask=torch.ones_like(ids)[None],
            encoder_hidden_states=model.connector(states.flatten(0, 1)[None]),
            do_sample=False,
            eos_token_id=49,
            pad_token_id=0,
            **options,
        )[0, len(ids) :].tolist()
        assert new == theirs[: theirs.index(49)] if 49 in theirs else new == theirs


def test_every_parameter_gets_a_gradient_whatever_the_batch_holds() -> None:
    for samples in (SAMPLES, [(0, 9), (1, 4)], [(0, 9), (0, 4)]):
        model = make()
        model(make_batch(samples, per_frame=0)).loss_sum.backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_pretrained_parts_keep_their_weights_and_only_looking_is_new(tmp_path: Path) -> None:
    values = dict(GPT2)
    plain = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(values.pop("model_type"), **values)
    )
    plain.save_pretrained(tmp_path)
    model = registry.build(recipe(language={"pretrained": str(tmp_path)}), 50, 0)
    own, given = model.language.lm.state_dict(), plain.state_dict()
    assert all(torch.equal(own[name], given[name]) for name in given)
    assert all("crossattention" in n or "ln_cross_attn" in n for n in own.keys() - given.keys())


def test_a_saved_model_is_the_same(tmp_path: Path) -> None:
    model, batch = make().float(), make_batch(SAMPLES, per_frame=0)
    model.save_pretrained(tmp_path)
    for loaded in (registry.load(tmp_path).eval(), AutoModel.from_pretrained(tmp_path).eval()):
        assert torch.equal(loaded(batch).loss_sum, model(batch).loss_sum)


def test_language_models_that_cannot_look_are_refused(tmp_path: Path) -> None:
    llama = {"config": {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2}}
    with pytest.raises(ConfigError, match="'llama', whose blocks cannot look at anything"):
        registry.build(recipe(language=llama), 50, 0)
    values = dict(GPT2)
    plain = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(values.pop("model_type"), **values)
    )
    plain.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="lora and quantize leave the base as it is"):
        registry.build(recipe(language={"pretrained": str(tmp_path), "lora": {}}), 50, 0)


def test_no_number_is_read_from_the_device_to_see_frames() -> None:
    """On the meta device there is none to read, so whoever waited for one would fail."""
    model, batch = make(), make_batch(SAMPLES, per_frame=0)
    real = model.context(batch)
    found = model.to("meta").context(batch.to(torch.device("meta")))
    assert (found.tokens.shape, found.mask.shape) == (real.tokens.shape, real.mask.shape)
