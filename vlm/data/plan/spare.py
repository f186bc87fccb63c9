"""Which sample stands in for one that cannot be read: part of the plan, the same on every rank.

A substitute has at most the tokens and frames of the row it replaces, so that shapes and budgets
hold. Not here: who finds that a row is bad, and counts (the loader).
"""

from collections.abc import Iterator

import numpy as np

from vlm.data.plan.policy import Rows
from vlm.data.plan.stream import SPARE, permutation, philox

_CHUNK = 1 << 16  # rows looked at together: more than a shard, as a whole one may be gone


def substitutes(
    rows: Rows, chosen: np.ndarray, tokens_per_frame: int, seed: int, epoch: int, row: int
) -> Iterator[int]:
    """Yields every row that fits, once, in an order drawn for (seed, epoch, row).

    First those of the same source and kind, then of the same kind, then of a plainer kind.

    Args:
        chosen: (n,) bool, the rows that the plan uses.
    """
    lengths, frames = rows.sizes(np.array([row]), tokens_per_frame)
    first, last = rows.source_range(row)
    bits = philox(seed, SPARE, epoch, row)
    kind = int(rows.kind[row])
    for plainer, start, stop, skip in (
        (False, first, last, (0, 0)),
        (False, 0, len(rows), (first, last)),
        (True, 0, len(rows), (0, 0)),
    ):
        for own in _chunks(bits, start, stop):
            own = own[(own < skip[0]) | (own >= skip[1])]
            kinds = rows.kind[own]
            fits = (kinds < kind) if plainer else (kinds == kind)
            fits &= chosen[own] & (own != row)
            own = own[fits]
            own_lengths, own_frames = rows.sizes(own, tokens_per_frame)
            own = own[(own_lengths <= lengths[0]) & (own_frames <= frames[0])]
            yield from own[permutation(bits, len(own))].tolist()


def _chunks(bits: np.random.Philox, start: int, stop: int) -> Iterator[np.ndarray]:
    """The numbers [start, stop) in chunks of neighbours, from a drawn one on and around."""
    size = stop - start
    offset = int(bits.random_raw(1)[0] % np.uint64(size))
    for done in range(0, size, _CHUNK):
        yield start + (offset + np.arange(done, min(done + _CHUNK, size))) % size
