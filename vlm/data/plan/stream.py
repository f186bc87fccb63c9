"""A stream: some rows of one source, shuffled anew in each pass, without end.

Each pass shuffles the shards, lays their rows end to end, cuts that into blocks and permutes the
rows of a block; so reading stays near few shards while rows meet in a large radius. All passes
have the same blocks, hence any part of the stream follows from its position alone. Random numbers
come from Philox, keyed by what they are for, and permutations use only its raw output, which no
release of numpy changes. Not here: how much of which stream there is (``vlm.data.plan.mixture``).
"""

import numpy as np

#: What random numbers are for: the second word of Philox' key. Text streams add one.
SHARDS, ROWS, MIX, ORDER, SAMPLE, SPARE, QUESTION, TRIAL = 0, 2, 4, 5, 6, 7, 8, 9


def philox(seed: int, purpose: int, epoch: int, index: int, source: int = 0, /) -> np.random.Philox:
    """A generator of its own for each argument list: no two share a number of their 2**64."""
    key = np.array([seed, purpose], np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, epoch, index, source], np.uint64))


def permutation(bits: np.random.Philox, size: int) -> np.ndarray:
    return np.argsort(bits.random_raw(size), kind="stable")


def num_parts(total: int, size: int) -> int:
    """How many parts of about ``size`` make ``total``: all of that size but the last, which takes
    what is left, from half to one and a half of it."""
    return max(1, (2 * total + size) // (2 * size))


class Stream:
    """The text rows of a source, or all others, as an endless sequence.

    Args:
        shard: (n,) shard of each row of the source, ascending.
        chosen: (n,) bool, the rows of this stream; at least one.
        first_row: Of the source in the catalog.
        source: Number of the source, so that each is shuffled by itself.
        block_rows: Rows of a block; the last of a pass differs.
    """

    def __init__(
        self,
        shard: np.ndarray,
        chosen: np.ndarray,
        *,
        first_row: int,
        source: int,
        seed: int,
        is_text: bool,
        block_rows: int,
    ) -> None:
        self._chosen, self._first_row = chosen, first_row
        self._source, self._seed, self._is_text = source, seed, is_text
        starts = np.flatnonzero(shard[1:] != shard[:-1]) + 1
        starts, stops = np.append(0, starts), np.append(starts, len(shard))
        sums = np.add.reduceat(chosen, starts, dtype=np.int64)
        holds_any = sums > 0
        #: (s,) of the shards with rows of this stream: their rows in the source, and how many
        self._starts, self._stops = starts[holds_any], stops[holds_any]
        self._counts = sums[holds_any]
        self.num_rows = int(sums.sum())
        self._block_rows = block_rows
        self._num_blocks = num_parts(self.num_rows, block_rows)
        self._layouts: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def take(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the catalog at positions [start, stop) of the endless stream, and the pass that
        each belongs to, from 0; both int64."""
        parts, passes = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        while start < stop:
            epoch, offset = divmod(start, self.num_rows)
            block = min(offset // self._block_rows, self._num_blocks - 1)
            offset -= block * self._block_rows
            part = self._block(epoch, block)[offset : offset + stop - start]
            parts.append(part)
            passes.append(np.full(len(part), epoch))
            start += len(part)
        return np.concatenate(parts), np.concatenate(passes)

    def _block(self, epoch: int, block: int) -> np.ndarray:
        order, before = self._layout(epoch)
        start = block * self._block_rows
        last = block + 1 == self._num_blocks
        stop = self.num_rows if last else start + self._block_rows
        first = int(np.searchsorted(before, start, "right")) - 1
        shards = order[first : int(np.searchsorted(before, stop))]
        starts, sizes = self._starts[shards], self._stops[shards] - self._starts[shards]
        ends = np.cumsum(sizes)
        rows = np.arange(ends[-1]) + np.repeat(starts - ends + sizes, sizes)
        rows = rows[self._chosen[rows]][start - before[first] : stop - before[first]]
        bits = philox(self._seed, ROWS + self._is_text, epoch, block, self._source)
        return rows[permutation(bits, len(rows))] + self._first_row

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Order of the shards, and (s+1,) rows before each. Of the last two passes it is kept."""
        if epoch not in self._layouts:
            bits = philox(self._seed, SHARDS + self._is_text, epoch, 0, self._source)
            order = permutation(bits, len(self._counts))
            before = np.concatenate([[0], np.cumsum(self._counts[order])])
            while len(self._layouts) >= 2:
                del self._layouts[next(iter(self._layouts))]
            self._layouts[epoch] = order, before
        return self._layouts[epoch]
