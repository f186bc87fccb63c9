"""Generation behind any prompt with frames, in a batch, with a key-value cache; greedy or sampled.

Not here: beams.
"""

from typing import Any

import torch
from torch import Tensor

from vlm.batch import Batch


@torch.no_grad()
def generate(
    model: Any,
    batch: Batch,
    *,
    eos_token_id: int,
    max_new_tokens: int,
    mode: str | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Continues every sample of ``batch`` until its end of turn.

    Prompts are padded on the right; the pads stay in the cache and are masked, and every new token
    gets the position it would have without them.

    Args:
        mode: forward mode of the prompt; None: the model's own.
        temperature: 0 takes the most likely token, else tokens are drawn by it.
        top_p: drawn among the most likely tokens that have this much probability together.
        generator: of the draws, on the model's device.

    Returns:
        The new ids of each sample, without the end of turn.
    """
    hidden, cache, lengths = model.prefill(batch, mode or model.modes[0])
    rows = torch.arange(batch.num_samples, device=lengths.device)
    state = hidden[rows, lengths - 1]
    columns = torch.arange(hidden.shape[1], device=lengths.device)
    mask = (columns < lengths[:, None]).long()
    done = torch.zeros_like(lengths, dtype=torch.bool)
    new: list[Tensor] = []
    for step in range(max_new_tokens):
        token = choose(model.language.logits(state), temperature, top_p, generator)
        done = done | (token == eos_token_id)
        new.append(torch.where(done, eos_token_id, token))
        if bool(done.all()) or step == max_new_tokens - 1:
            break
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        embeds = model.language.embed(token)[:, None]
        positions = (lengths + step)[:, None]
        state = model.language.run_rows(embeds, cache, mask, positions)[:, 0]
    ids = torch.stack(new, dim=1).tolist()
    return [row[: row.index(eos_token_id)] if eos_token_id in row else row for row in ids]


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
