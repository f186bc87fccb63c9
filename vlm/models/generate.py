"""Generation behind any prompt with frames, in a batch, with a key-value cache.

Greedy, drawn, or by beam search (``vlm.models.beams``). Prompts of unequal length are padded on the
left: the pads are masked, every token has the position it would have without them, and what a
sliding window reaches is what it would reach.

Legend: S samples, B beams, L tokens of the longest prompt, H width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlm.batch import Batch
from vlm.models.beams import Beams
from vlm.models.family import Prefill


@torch.no_grad()
def generate(
    model: Any,
    batch: Batch,
    *,
    eos_token_id: int | Sequence[int],
    max_new_tokens: int,
    mode: str | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_beams: int = 1,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Continues every sample of ``batch`` until its end of turn.

    Args:
        eos_token_id: one or several tokens that end an answer, see ``chat.stop_ids``.
        mode: forward mode of the prompt; None: the model's own.
        temperature: 0 takes the most likely token, else tokens are drawn by it.
        top_p: drawn among the most likely tokens that have this much probability together.
        num_beams: more than 1 searches for the likeliest answer; nothing is drawn then.
        generator: of the draws, on the model's device.

    Returns:
        The new ids of each sample, without the prompt and what ended the answer.
    """
    assert num_beams == 1 or temperature == 0, "beam search draws nothing"
    stops = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    prompts = _pad_left(model.prefill(batch, mode or model.modes[0]))
    if num_beams > 1:
        found = _search(model, prompts, stops, max_new_tokens, num_beams)
    else:
        draw = (temperature, top_p, generator)
        found = _follow(model, prompts, stops, max_new_tokens, draw)
    return [_before_stop(ids, stops) for ids in found]


def _follow(
    model: Any,
    prompts: Prefill,
    stops: list[int],
    max_new_tokens: int,
    draw: tuple[float, float, torch.Generator | None],
) -> list[list[int]]:
    """One sequence for each sample."""
    state, done = prompts.hidden[:, -1], torch.zeros_like(prompts.lengths, dtype=torch.bool)
    ends = torch.tensor(stops, device=done.device)
    new: list[Tensor] = []
    for step in range(max_new_tokens):
        token = choose(model.language.logits(state), *draw)
        new.append(torch.where(done, stops[0], token))
        done = done | torch.isin(token, ends)
        if bool(done.all()) or step == max_new_tokens - 1:
            break
        state = _read(model, prompts, token, step)
    return torch.stack(new, dim=1).tolist()


def _search(
    model: Any, prompts: Prefill, stops: list[int], max_new_tokens: int, num_beams: int
) -> list[list[int]]:
    hidden, lengths = (x.repeat_interleave(num_beams, 0) for x in (prompts[0], prompts[2]))
    prompts.cache.batch_repeat_interleave(num_beams)
    rows = Prefill(hidden, prompts.cache, lengths)
    state = hidden[:, -1]
    beams = Beams(len(prompts.lengths), num_beams, stops, state.device)
    for step in range(max_new_tokens):
        choice = beams.step(model.language.logits(state), step == max_new_tokens - 1)
        if choice is None:
            break
        # beams of a sample share its prompt, so that masks and positions stay
        rows.cache.reorder_cache(choice.rows)
        state = _read(model, rows, choice.tokens, step)
    return beams.best()


def _read(model: Any, prompts: Prefill, tokens: Tensor, step: int) -> Tensor:
    """(S,) newest tokens -> (S, H) states, their keys and values in the cache."""
    length = prompts.hidden.shape[1]
    columns = torch.arange(length + step + 1, device=tokens.device)
    mask = (columns >= (length - prompts.lengths)[:, None]).long()
    positions = (prompts.lengths + step)[:, None]
    embeds = model.language.embed(tokens)[:, None]
    return model.language.run_rows(embeds, prompts.cache, mask, positions)[:, 0]


def _pad_left(prompts: Prefill) -> Prefill:
    """Prompts were read with pads on the right; behind them new tokens would be too far away."""
    length = prompts.hidden.shape[1]
    columns = torch.arange(length, device=prompts.lengths.device)
    source = (columns + prompts.lengths[:, None]) % length  # (S, L)
    for layer in prompts.cache.layers:
        index = source[:, None, :, None].to(layer.keys.device)
        layer.keys = layer.keys.gather(2, index.expand_as(layer.keys))
        layer.values = layer.values.gather(2, index.expand_as(layer.values))
    hidden = prompts.hidden.gather(1, source[..., None].expand_as(prompts.hidden))
    return Prefill(hidden, prompts.cache, prompts.lengths)


def _before_stop(ids: list[int], stops: list[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]


def choose(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """(S, V) logits -> (S,) tokens."""
    if temperature == 0:
        return logits.argmax(-1)
    ordered, tokens = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    # a token stays as long as those before it have not reached top_p
    kept = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
    drawn = torch.multinomial(kept, 1, generator=generator)
    return tokens.gather(-1, drawn)[:, 0]
