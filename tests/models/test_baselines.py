"""The baselines against the language model's own forward, sample by sample."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.models.reference import check_greedy, check_losses
from tests.models.tiny import IMAGE, make_baseline, make_batch
from vlm.models import registry

SAMPLES = [(3, 7), (1, 12), (0, 6), (2, 4)]
#: keys of the connector -> placeholders of a frame of 4 x 4 patches
CONNECTORS = {
    "pool 4": ({"tokens_per_frame": 4}, 4),
    "pool 16": ({"tokens_per_frame": 16}, 16),
    "shuffle": ({"tokens_per_frame": 4, "reduction": "pixel_shuffle"}, 4),
    "blind": ({}, 0),
}
each = pytest.mark.parametrize("name", CONNECTORS)


def make(name, samples=SAMPLES, **options):
    connector, per_frame = CONNECTORS[name]
    batch = make_batch(samples, per_frame=per_frame, size=32, **options)
    return make_baseline(**connector), batch


def plain_hidden(model, frames: Tensor, ids: Tensor) -> Tensor:
    """(N, H) by whole models of transformers, for one sample."""
    embeds = model.language.embed(ids).clone()
    at = (ids == IMAGE).nonzero().flatten()
    if len(at):
        last = model.vision.tower(model.vision.normalise(frames)).last_hidden_state[:, 1:]
        patches = last.transpose(1, 2).unflatten(2, (4, 4))
        tokens = model.connector(patches)
        embeds[at[: len(tokens)]] = tokens
    return model.language.lm.get_decoder()(inputs_embeds=embeds[None]).last_hidden_state[0]


@each
@pytest.mark.parametrize("before", [0, 2])
def test_loss_is_that_of_each_sample_alone(name: str, before: int) -> None:
    check_losses(*make(name, before=before), plain_hidden)


@each
def test_every_parameter_gets_a_gradient_whatever_the_batch_holds(name: str) -> None:
    for samples in (SAMPLES, [(0, 9), (0, 4)]):
        model, batch = make(name, samples)
        model(batch).loss_sum.backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None]
        assert [n for n in missing if "mask_token" not in n] == []


def test_the_blind_see_no_frame() -> None:
    model, batch = make("blind")
    assert not batch.has_frames and len(batch.frames) == 6
    assert {name.partition(".")[0] for name, _ in model.named_parameters()} == {"language"}


@each
def test_generation_equals_forwards_without_a_cache(name: str) -> None:
    model, batch = make(name)
    check_greedy(model, batch, plain_hidden, 3)


@each
def test_a_saved_baseline_is_the_same(name: str, tmp_path: Path) -> None:
    model, batch = make(name)
    model = model.float()
    model.save_pretrained(tmp_path)
    loaded = registry.load(tmp_path).eval()
    assert type(loaded) is type(model)
    assert torch.equal(loaded(batch).loss_sum, model(batch).loss_sum)
    options = {"eos_token_id": -1, "max_new_tokens": 3}
    assert loaded.generate(batch, **options) == model.generate(batch, **options)
