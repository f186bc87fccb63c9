"""Windows to cut and what must hold of every cut, for tests of both batchings."""

import itertools

import numpy as np

from vlm.data.plan.pack import Cut

FRAME_COST = 3.7


def random_window(seed: int, most: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths, frames and kinds; a row costs at most 400."""
    rng = np.random.default_rng(seed)
    num_rows = int(rng.integers(1, most))
    kinds = rng.integers(0, 3, num_rows)
    frames = np.where(kinds == 0, 0, rng.integers(1, 41, num_rows))
    lengths = np.exp(rng.normal(3.5, 0.8, num_rows)).astype(np.int64).clip(1, 200) + frames
    return lengths, frames, kinds


def check_cut(cut: Cut, num_rows: int, multiple: int) -> list[np.ndarray]:
    """The micro-batches, after checking that they share all rows, ascending, none empty."""
    order, edges = cut
    assert edges[0] == 0
    assert edges[-1] == num_rows
    batches = [order[a:b] for a, b in itertools.pairwise(edges)]
    assert len(batches) % multiple == 0
    assert all(len(batch) for batch in batches)
    assert all((np.diff(batch) > 0).all() for batch in batches)
    assert sorted(order.tolist()) == list(range(num_rows))
    return batches
