import itertools

import numpy as np
import pytest

from tests.data.cuts import FRAME_COST, check_cut, random_window
from vlm.data.plan import bucket


def padded_cost(lengths: np.ndarray, frames: np.ndarray, batch: np.ndarray) -> float:
    return len(batch) * int(lengths[batch].max()) + FRAME_COST * int(frames[batch].sum())


@pytest.mark.parametrize("seed", range(60))
def test_bucketed_cuts_hold(seed: int) -> None:
    lengths, frames, kinds = random_window(seed)
    multiple, budget = (1, 2, 4, 8)[seed % 4], (400, 900, 3000)[seed % 3]
    cut = bucket.cut_bucketed(lengths, frames, kinds, FRAME_COST, budget, multiple)
    if cut is None:
        assert len(lengths) < 4 * multiple
        return
    edges_of_buckets = [0, 4, 8, 16, 32, 64]
    for batch in check_cut(cut, len(lengths), multiple):
        assert padded_cost(lengths, frames, batch) <= budget
        assert len(set(kinds[batch])) == 1
        own = frames[batch][frames[batch] > 0]
        assert len(set(np.searchsorted(edges_of_buckets, own))) <= 1


@pytest.mark.parametrize("seed", range(40))
def test_one_group_is_cut_as_evenly_as_can_be(seed: int) -> None:
    """Against all contiguous cuts of the sorted rows."""
    rng = np.random.default_rng(seed)
    num_rows, multiple = int(rng.integers(3, 11)), int(rng.integers(1, 4))
    lengths, frames = rng.integers(10, 100, num_rows), rng.integers(1, 5, num_rows)
    kinds, order = np.full(num_rows, 2), np.argsort(lengths, kind="stable")

    def bottleneck(num_batches: int) -> float:
        return min(
            max(padded_cost(lengths, frames, b) for b in np.split(order, stops))
            for stops in itertools.combinations(range(1, num_rows), num_batches - 1)
        )

    budget = 300.0
    best = next(
        (
            (k, cost)
            for k in range(multiple, num_rows + 1, multiple)
            if (cost := bottleneck(k)) <= budget
        ),
        None,
    )
    cut = bucket.cut_bucketed(lengths, frames, kinds, FRAME_COST, budget, multiple)
    if best is None:
        assert cut is None
        return
    assert cut is not None
    batches = check_cut(cut, num_rows, multiple)
    assert len(batches) == best[0]
    assert max(padded_cost(lengths, frames, b) for b in batches) <= best[1] + budget / 1000


def test_frame_buckets_end_at_powers_of_two() -> None:
    frames = np.arange(1, 300)
    lengths = np.full(299, 10)
    cut = bucket.cut_bucketed(lengths, frames, np.full(299, 2), 0, 10**6, 1)
    assert cut is not None
    bounds = [(int(frames[b].min()), int(frames[b].max())) for b in check_cut(cut, 299, 1)]
    assert bounds == [
        (1, 4),
        (5, 8),
        (9, 16),
        (17, 32),
        (33, 64),
        (65, 128),
        (129, 256),
        (257, 299),
    ]


def test_equal_rows_still_make_a_multiple() -> None:
    """One cap for all cannot cut 1000 equal rows into 128; some are halved."""
    lengths, frames = np.full(1000, 10), np.zeros(1000, np.int64)
    cut = bucket.cut_bucketed(lengths, frames, frames, 0, 100, 64)
    assert cut is not None
    batches = check_cut(cut, 1000, 64)
    assert len(batches) == 128
    assert max(map(len, batches)) == 8


def test_rows_that_share_with_none_cannot_make_any_multiple() -> None:
    for num_rows, possible in ((16, True), (17, False)):
        lengths, none = np.full(num_rows, 90), np.zeros(num_rows, np.int64)
        cut = bucket.cut_bucketed(lengths, none, none, 0, 100, 8)
        assert (cut is not None) == possible
