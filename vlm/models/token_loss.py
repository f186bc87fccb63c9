"""Cross entropy of learned tokens over a large vocabulary, without all its logits at once.

*Pieces*: the head scores some tokens at a time, and their logits are dropped and computed again in
the backward pass. *Fused*, on a GPU where Liger is installed (``pip install saccade[liger]``): its
kernels go over the logits in place. Both give the value and gradient of plain cross entropy
(``tests/models/test_token_loss.py``).

Legend: T tokens, H width, V vocabulary.
"""

import functools
import importlib.util
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

#: most logits at a time, in numbers: 256 MB in float32
MAX_LOGITS = 1 << 26

#: (T, H) -> (T, V)
Head = Callable[[Tensor], Tensor]


def loss_chunks(max_tokens: float, vocab_size: int) -> int:
    """Pieces in which so many tokens are scored with at most ``MAX_LOGITS`` logits at a time."""
    return math.ceil(max_tokens * vocab_size / MAX_LOGITS)


def token_losses(head: Head, states: Tensor, targets: Tensor, num_chunks: int) -> Tensor:
    """(T,) cross entropies in float32, in the way that suits the device.

    Args:
        states: (T, H).
        targets: (T,).
        num_chunks: pieces; a constant of the run, because under ZeRO-3 every call of the head is
            one that all ranks must make.
    """
    if states.is_cuda and has_liger() and is_plain(head, states):
        assert isinstance(head, nn.Linear)
        return fused(head, states, targets)
    if num_chunks == 1:
        return plain(head, states, targets)
    pieces = zip(states.tensor_split(num_chunks), targets.tensor_split(num_chunks), strict=True)
    return torch.cat([checkpoint(plain, head, *piece, use_reentrant=False) for piece in pieces])


def plain(head: Head, states: Tensor, targets: Tensor) -> Tensor:
    """(T,) with all logits at once."""
    return F.cross_entropy(head(states).float(), targets, reduction="none")


def fused(head: nn.Linear, states: Tensor, targets: Tensor) -> Tensor:
    """(T,) by Liger."""
    from liger_kernel.transformers.functional import (  # an optional dependency
        liger_fused_linear_cross_entropy,
    )

    return liger_fused_linear_cross_entropy(states, head.weight, targets, reduction="none")


def is_plain(head: Head, states: Tensor) -> bool:
    """Whether the head is one whole matrix: no adapter, no bias, no share of ZeRO-3."""
    return (
        type(head) is nn.Linear
        and head.bias is None
        and head.weight.shape == (head.out_features, head.in_features)
        and head.weight.dtype == states.dtype
    )


@functools.cache
def has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None
