"""A stream: the rows of one half of a manifest, shuffled anew each epoch, without end.

Each epoch shuffles the shards, groups neighbours into blocks, and permutes the rows of a block; so
reading stays near few shards while rows meet in a large radius. Every epoch has the same number
of blocks, hence any part of the stream follows from its index alone. Random numbers come from
Philox, keyed by what they are for, and permutations use only its raw output, which no release of
numpy changes. Not here: what becomes of the rows (``vlm.data.plan``).
"""

import numpy as np

#: What random numbers are for: the second word of Philox' key. Text streams add one.
SHARDS, ROWS, MIX, ORDER, SAMPLE, SPARE = 0, 2, 4, 5, 6, 7


def philox(seed: int, purpose: int, epoch: int, index: int) -> np.random.Philox:
    """A generator of its own for each argument list: no two share a number of their 2**64."""
    key = np.array([seed, purpose], np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, epoch, index, 0], np.uint64))


def permutation(bits: np.random.Philox, size: int) -> np.ndarray:
    return np.argsort(bits.random_raw(size), kind="stable")


class Stream:
    """Text rows, or all others, as an endless sequence.

    Args:
        shard: (n,) shard of each row of the manifest, ascending.
        chosen: (n,) bool, the rows of this stream; at least one.
        block_size: A block holds at least so many rows, if the stream does.
    """

    def __init__(
        self, shard: np.ndarray, chosen: np.ndarray, seed: int, is_text: bool, block_size: int
    ) -> None:
        self.seed = seed
        self.is_text = is_text
        self.block_size = block_size
        self.chosen = chosen
        starts = np.flatnonzero(np.diff(shard, prepend=shard[:1] + 1))
        counts = np.add.reduceat(chosen, starts, dtype=np.int64)
        stops = np.append(starts[1:], len(shard))
        holds_any = counts > 0
        #: (s,) of the shards with rows of this stream: their rows in the manifest, and how many
        self._starts, self._stops = starts[holds_any], stops[holds_any]
        self._counts = counts[holds_any]
        self.num_rows = int(counts.sum())
        # Cuts at even shares of an epoch, each moved to the end of a shard: no block loses more
        # than a shard to its neighbour, whatever the order of the shards.
        worst = block_size + int(self._counts.max()) - 1
        self.num_blocks = max(1, self.num_rows // worst)

    def rows_before(self, epoch: int, block: int) -> int:
        """Rows of this epoch that come before a block."""
        return int(self._layout(epoch)[2][block])

    def block(self, epoch: int, block: int) -> np.ndarray:
        """Rows of the manifest, int64, in the order of the stream."""
        order, stops, _ = self._layout(epoch)
        shards = order[stops[block] : stops[block + 1]]
        starts, sizes = self._starts[shards], self._stops[shards] - self._starts[shards]
        ends = np.cumsum(sizes)
        rows = np.arange(ends[-1]) + np.repeat(starts - ends + sizes, sizes)
        rows = rows[self.chosen[rows]]
        bits = philox(self.seed, ROWS + self.is_text, epoch, block)
        return rows[permutation(bits, len(rows))]

    def take(self, start: int, stop: int) -> np.ndarray:
        """Rows at the positions [start, stop) of the endless stream."""
        parts = [np.empty(0, np.int64)]
        while start < stop:
            epoch, offset = divmod(start, self.num_rows)
            before = self._layout(epoch)[2]
            block = int(np.searchsorted(before, offset, "right")) - 1
            offset -= int(before[block])
            part = self.block(epoch, block)[offset : offset + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts)

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Order of the shards; (B+1,) where blocks end, in shards, and in rows."""
        bits = philox(self.seed, SHARDS + self.is_text, epoch, 0)
        order = permutation(bits, len(self._counts))
        before = np.concatenate([[0], np.cumsum(self._counts[order])])
        shares = np.arange(self.num_blocks + 1) * self.num_rows
        stops = np.searchsorted(before * self.num_blocks, shares)
        return order, stops, before[stops]
