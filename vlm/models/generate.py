"""Greedy generation behind any prompt with frames, in a batch, with a key-value cache.

Not here: sampling and beams.
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
) -> list[list[int]]:
    """Continues every sample of ``batch`` until its end of turn.

    Prompts are padded on the right; the pads stay in the cache and are masked, and every new token
    gets the position it would have without them.

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
        token = model.language.logits(state).argmax(-1)
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
