"""Saved and loaded by transformers' Auto classes, every family computes the same, bit for bit."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel

from tests.models import tiny
from tests.models.cases import CASES
from tests.models.test_latent import with_latents
from vlm.models import registry

SAMPLES = [(3, 7), (1, 5), (0, 6)]


def test_the_cases_are_all_families_and_all_modes_that_train() -> None:
    found: dict[type, set[str]] = {}
    for make, _, mode in CASES.values():
        found.setdefault(type(make()), set()).add(mode)
    assert found == {family: set(family.train_modes) for family in registry.FAMILIES.values()}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_answers_survive_bit_for_bit(name: str, tmp_path: Path) -> None:
    make, per_frame, _ = CASES[name]
    model = make().float().eval()
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), type(model.config))
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model) and loaded.dtype == torch.float32
    weights = loaded.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    batch = with_latents(tiny.make_batch(SAMPLES, per_frame=per_frame))
    for mode in model.modes:
        own, other = (one(batch, mode=mode) for one in (model, loaded))
        assert torch.equal(own.loss_sum, other.loss_sum), mode
        assert all(torch.equal(value, other.parts[key]) for key, value in own.parts.items())
        for temperature in (0.0, 0.8):
            answers = [
                one.generate(
                    batch,
                    mode=mode,
                    eos_token_id=-1,
                    max_new_tokens=4,
                    temperature=temperature,
                    generator=torch.Generator().manual_seed(3),
                )
                for one in (model, loaded)
            ]
            assert answers[0] == answers[1] and len(answers[0]) == len(SAMPLES)
