"""Puts vision tokens where their placeholders stand. Knows nothing of families.

Placeholders are found and counted when a batch is built (``vlm.batch.build_batch``); here they are
only filled, so nothing waits for the device.
"""

from torch import Tensor


def fill(embeds: Tensor, index: Tensor, tokens: Tensor) -> Tensor:
    """Replaces rows of ``embeds`` by vision tokens.

    Args:
        embeds: (N, H) text embeddings, anything at the placeholders.
        index: (K,) where the placeholders stand.
        tokens: (K, H), or the tokens of a blank frame when ``index`` is empty.

    Returns:
        (N, H). With no placeholder the tokens still take part, times zero: each rank must give
        a gradient to the same parameters, or ZeRO reduces different ones together.
    """
    if index.numel() == 0:
        return embeds + 0.0 * tokens.sum().to(embeds.dtype)
    return embeds.index_copy(0, index, tokens.to(embeds.dtype))
