"""How a foveated model looks, and where: what tells whether its queries choose anything.

Measured beside a forward pass, from what it has computed already: a query costs a tower one token
of the hundreds that a frame has. Nothing here waits for the device. Not here: what counts as
unhealthy (``vlm.train.health``).

Legend: F frames, P tokens of a frame, N tokens, Q query width, H language width.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Looks(NamedTuple):
    """One look at every frame of a micro-batch."""

    #: (F, Q)
    queries: Tensor
    #: (F, H), as the language model gets them
    tokens: Tensor
    #: (F, layers, heads, P) probabilities
    attention: Tensor


def measure(
    passes: Mapping[str, Looks], text: Tensor, is_text: Tensor, follows: Tensor, owned: Tensor
) -> dict[str, Tensor]:
    """What the coarse and the last fine pass did, by name.

    What compares the two, or queries of frames, is left out where there was no fine pass; tokens
    are those of the last pass there was.

    Args:
        passes: "coarse", and "fine", the last of the fine ones.
        text: (N, H) embeddings.
        is_text: (N,) True where no frame stands.
        follows: (F,) True at frames with another one of the same sample before them.
        owned: (F,) False at a blank frame that no sample owns.

    Returns:
        (2,) float64 each: a sum and of how many, so that micro-batches and ranks add up.
    """
    looks = {name: Looks(*(part.float() for part in one)) for name, one in passes.items()}
    static, fine = looks["coarse"], looks.get("fine")
    last = fine or static
    some, visual = owned.any(), owned[:, None]
    found = {
        "attention_entropy_static": (entropy(static.attention), owned),
        "attention_entropy_max": (last.tokens.new_tensor(math.log(last.attention.shape[-1])), some),
        "look_similarity": (to_the_one_before(last.tokens), follows),
        "q_static_std": (static.queries[0].std(correction=0), some),
        "visual_std": (std(last.tokens, visual), some),
        "embedding_std": (std(text.float(), is_text[:, None]), some),
    }
    if fine is not None:
        spread = std(static.tokens, visual)
        change = (fine.tokens - static.tokens).abs().mean(-1) / spread.clamp_min(1e-12)
        found |= {
            "attention_entropy": (entropy(fine.attention), owned),
            "query_similarity": (to_the_one_before(fine.queries), follows),
            "look_change": (change, owned),
        }
    return {name: _sum(values, where) for name, (values, where) in found.items()}


def over_patches(attention: Tensor, grid: tuple[int, int]) -> Tensor:
    """(F, layers, heads, P) -> (F, rows, columns), the mean over layers and heads.

    CLS and registers, which come before the patches, are left out, so a map sums to less than 1.
    """
    return attention.float().mean((1, 2))[:, -math.prod(grid) :].unflatten(1, grid)


def entropy(attention: Tensor) -> Tensor:
    """(F, layers, heads, P) -> (F,) nats, the mean over layers and heads."""
    return torch.special.entr(attention).sum(-1).mean((1, 2))


def to_the_one_before(vectors: Tensor) -> Tensor:
    """(F, D) -> (F,) cosine of each with the one before it; the first's is with the last."""
    return F.cosine_similarity(vectors, vectors.roll(1, dims=0), dim=-1)


def std(values: Tensor, where: Tensor) -> Tensor:
    """Of all numbers of the rows of ``values`` (R, D) at which ``where`` (R, 1) is True."""
    count = where.sum().clamp_min(1) * values.shape[-1]
    mean = (values * where).sum() / count
    return (((values - mean) ** 2 * where).sum() / count).sqrt()


def _sum(values: Tensor, where: Tensor) -> Tensor:
    kept = torch.where(where, values.double(), 0.0)
    return torch.stack([kept.sum(), where.sum().double()])
