"""Greedy generation, in batches and from a cache, against whole forwards without either."""

import pytest
import torch
from torch import Tensor

from tests.models.reference import plain_hidden, plain_queries, sample
from tests.models.tiny import make_batch, make_model
from vlm.models.foveated import MODES, FoveatedModel, Mode
from vlm.models.generate import choose, generate

PROMPTS = [(3, 5), (1, 9), (0, 4), (5, 2)]


@torch.no_grad()
def say(model: FoveatedModel, frames: Tensor, ids: Tensor, mode: Mode, count: int) -> list[int]:
    """Each token is the argmax of a whole forward over the prompt and what was said before."""
    queries = plain_queries(model, frames, ids, mode)
    for _ in range(count):
        hidden = plain_hidden(model, frames, ids, queries)
        ids = torch.cat([ids, model.language.logits(hidden[-1:]).argmax(-1)])
    return ids[-count:].tolist()


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize(("mode", "passes"), [*((mode, 1) for mode in MODES), ("coarse_fine", 3)])
def test_it_equals_forwards_without_a_cache(mode: Mode, passes: int, before: int) -> None:
    model, batch = make_model(fine_passes=passes), make_batch(PROMPTS, before=before)
    found = generate(model, batch, eos_token_id=-1, max_new_tokens=4, mode=mode)
    expected = []
    for index in range(len(PROMPTS)):
        frames, ids, _ = sample(batch, index)
        expected.append(say(model, frames, ids, mode, 4))
    assert found == expected
    assert len({tuple(row) for row in found}) > 1


@pytest.mark.parametrize("mode", MODES)
def test_text_alone_needs_no_frames(mode: Mode) -> None:
    model, batch = make_model(), make_batch([(0, 6), (0, 3)])
    found = generate(model, batch, eos_token_id=-1, max_new_tokens=3, mode=mode)
    for index in range(2):
        frames, ids, _ = sample(batch, index)
        assert found[index] == say(model, frames, ids, mode, 3)


def test_it_stops_at_the_end_of_turn() -> None:
    model, batch = make_model(), make_batch([(3, 5), (1, 9)])
    free = generate(model, batch, eos_token_id=-1, max_new_tokens=6)
    eos = free[0][2]
    stopped = generate(model, batch, eos_token_id=eos, max_new_tokens=6)
    for found, whole in zip(stopped, free, strict=True):
        assert found == (whole[: whole.index(eos)] if eos in whole else whole)
    assert len(stopped[0]) < 6


def test_it_stops_computing_when_all_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_model(), make_batch([(3, 5)])
    (free,) = generate(model, batch, eos_token_id=-1, max_new_tokens=6)
    steps: list[int] = []
    logits = model.language.logits
    monkeypatch.setattr(model.language, "logits", lambda h: steps.append(1) or logits(h))
    generate(model, batch, eos_token_id=free[1], max_new_tokens=6)
    assert len(steps) == free.index(free[1]) + 1


def test_one_new_token_takes_no_step_behind_the_prompt() -> None:
    model, batch = make_model(), make_batch(PROMPTS)
    whole = generate(model, batch, eos_token_id=-1, max_new_tokens=3)
    assert generate(model, batch, eos_token_id=-1, max_new_tokens=1) == [r[:1] for r in whole]


def test_draws_follow_the_temperature_and_stay_within_top_p() -> None:
    """Frequencies against probabilities by hand: .5, .3, .15, .05 at a temperature of 2."""
    wanted = torch.tensor([0.15, 0.5, 0.05, 0.3])
    logits = (2 * wanted.log()).expand(20_000, -1)
    for top_p, expected in ((1.0, wanted), (0.8, torch.tensor([0.0, 0.625, 0.0, 0.375]))):
        generator = torch.Generator().manual_seed(0)
        drawn = choose(logits, 2.0, top_p, generator)
        found = torch.bincount(drawn, minlength=4) / len(drawn)
        torch.testing.assert_close(found, expected, rtol=0, atol=0.015)
    assert (choose(logits[:3], 2.0, 1e-9, None) == 1).all()
    assert (choose(logits[:3], 0.0, 1.0, None) == 1).all()


def test_a_seed_decides_what_is_drawn() -> None:
    model, batch = make_model(), make_batch(PROMPTS)
    options = {"eos_token_id": -1, "max_new_tokens": 6, "temperature": 0.7, "top_p": 0.9}
    one, same, other = (
        model.generate(batch, generator=torch.Generator().manual_seed(seed), **options)
        for seed in (1, 1, 2)
    )
    assert one == same != other


def test_any_of_several_tokens_ends_an_answer() -> None:
    model, batch = make_model(), make_batch(PROMPTS)
    free = generate(model, batch, eos_token_id=-1, max_new_tokens=6)
    stops = [free[0][2], free[1][3]]
    found = generate(model, batch, eos_token_id=stops, max_new_tokens=6)
    for row, whole in zip(found, free, strict=True):
        end = next((i for i, token in enumerate(whole) if token in stops), len(whole))
        assert row == whole[:end]


def test_the_last_state_of_a_forward_over_the_answer_says_the_same() -> None:
    """Teacher forcing: one forward over prompt and answer gives each token of it."""
    model, batch = make_model(), make_batch(PROMPTS)
    for index, new in enumerate(generate(model, batch, eos_token_id=-1, max_new_tokens=5)):
        frames, ids, _ = sample(batch, index)
        said = torch.cat([ids, torch.tensor(new)])
        queries = plain_queries(model, frames, ids, "coarse_fine")
        with torch.no_grad():
            hidden = plain_hidden(model, frames, said, queries)
            forced = model.language.logits(hidden[len(ids) - 1 : -1]).argmax(-1)
        assert forced.tolist() == new
