"""Beam search against transformers' own, which reads the same embeddings sample by sample."""

import pytest
import torch

from tests.models.reference import sample, single
from tests.models.tiny import make_batch, make_lm, make_model, make_projected
from vlm.models.beams import NEVER, Beams
from vlm.models.generate import generate
from vlm.models.one_pass import Projected

PROMPTS = [(2, 5), (1, 9), (0, 4), (3, 2)]
PER_FRAME = {"perceiver": 3, "prefix": 4}


@torch.no_grad()
def theirs(model: Projected, batch, index: int, stops: list[int], **options) -> list[int]:
    frames, ids, _ = sample(batch, index)
    embeds = model.language.embed(ids).clone()
    at = (ids == 3).nonzero().flatten()
    if len(at):
        embeds[at] = model.connector(model.vision(frames)).flatten(0, 1)
    found = model.language.lm.generate(
        inputs_embeds=embeds[None],
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        eos_token_id=stops,
        pad_token_id=0,
        **options,
    )[0].tolist()
    end = next((i for i, token in enumerate(found) if token in stops), len(found))
    return found[:end]


@pytest.mark.parametrize("family", PER_FRAME)
@pytest.mark.parametrize("num_beams", [1, 2, 3, 5])
@pytest.mark.parametrize("most", [1, 4, 7])
def test_it_finds_what_transformers_finds(family: str, num_beams: int, most: int) -> None:
    model, batch = make_projected(family), make_batch(PROMPTS, per_frame=PER_FRAME[family])
    free = generate(model, batch, eos_token_id=-1, max_new_tokens=7)
    stops = [free[0][2], free[1][1], 11]
    options = {"num_beams": num_beams, "max_new_tokens": most}
    found = generate(model, batch, eos_token_id=stops, **options)
    expected = [theirs(model, batch, i, stops, **options) for i in range(len(PROMPTS))]
    assert found == expected


def test_all_beams_go_on_where_each_could_end_in_several_ways() -> None:
    beams = Beams(1, 2, [0, 1], torch.device("cpu"))
    first = beams.step(torch.tensor([[-9.0, -9, 2, 1, -9, -9]]).expand(2, 6), False)
    assert first is not None and first.tokens.tolist() == [2, 3]
    # one of them goes on, both ends of the other are likelier than its going on, and so is one here
    second = beams.step(torch.tensor([[1.0, -9, -9, -9, 5, -9], [5, 4.9, -9, -9, -9, 1]]), False)
    assert second is not None
    assert (second.rows.tolist(), second.tokens.tolist()) == ([0, 1], [4, 5])
    assert float(beams.sums.min()) > NEVER / 2


def test_it_repeats_and_does_not_depend_on_who_is_in_the_batch() -> None:
    model, batch = make_projected("prefix"), make_batch(PROMPTS, per_frame=4)
    options = {"eos_token_id": 7, "max_new_tokens": 6, "num_beams": 3}
    first = generate(model, batch, **options)
    torch.manual_seed(123)
    assert generate(model, batch, **options) == first
    alone = single(batch, 0, 4)
    assert generate(model, alone, **options) == first[:1]


def test_any_family_can_be_searched() -> None:
    model, batch = make_model(), make_batch(PROMPTS)
    greedy = generate(model, batch, eos_token_id=-1, max_new_tokens=5)
    searched = generate(model, batch, eos_token_id=-1, max_new_tokens=5, num_beams=4)
    assert all(len(row) == 5 for row in searched) and searched != greedy


def test_a_sliding_window_reaches_as_far_behind_a_padded_prompt() -> None:
    """Padded on the right, a short prompt would lie outside of the window of what follows it."""
    torch.manual_seed(0)
    model = make_projected("prefix")
    lm = make_lm(model_type="mistral", sliding_window=6).double().eval()
    model.language.lm = lm
    batch = make_batch([(2, 9), (0, 4)], per_frame=4)
    together = generate(model, batch, eos_token_id=-1, max_new_tokens=6)
    short = make_batch([(2, 9), (0, 4)], per_frame=4)
    _, ids, _ = sample(short, 1)
    expected = lm.generate(
        input_ids=ids[None],
        attention_mask=torch.ones_like(ids)[None],
        do_sample=False,
        max_new_tokens=6,
        eos_token_id=None,
        pad_token_id=0,
    )[0, len(ids) :]
    assert together[1] == expected.tolist()
