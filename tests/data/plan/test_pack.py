import itertools

import numpy as np
import pytest

from tests.data.cuts import FRAME_COST, check_cut, random_window
from vlm.data.plan import pack


def test_lpt_by_hand() -> None:
    # 7 -> 0, 6 -> 1, 5 -> 1 (6 < 7), 4 -> 0, 3 -> 0 and 1 are at 11, the lower index wins
    assert pack.lpt([4, 7, 5, 3, 6], 2) == [0, 0, 1, 0, 1]


def test_lpt_breaks_ties_by_index() -> None:
    assert pack.lpt([2, 2, 2, 2], 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(40))
def test_lpt_against_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_bins = int(rng.integers(2, 4))
    costs = rng.integers(1, 50, rng.integers(num_bins, 9)).tolist()
    best = min(
        np.bincount(bins, costs, num_bins).max()
        for bins in itertools.product(range(num_bins), repeat=len(costs))
    )
    found = np.bincount(pack.lpt(costs, num_bins), costs, num_bins).max()
    assert best <= found <= (4 / 3 - 1 / (3 * num_bins)) * best  # Graham's bound


@pytest.mark.parametrize("seed", range(40))
def test_lpt_with_full_bins_against_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_bins, size = [(2, 3), (2, 4), (3, 2), (4, 2)][seed % 4]
    costs = rng.uniform(50, 100, num_bins * size).tolist()
    bins = pack.lpt(costs, num_bins, size)
    assert np.bincount(bins).tolist() == [size] * num_bins
    best = min(
        np.bincount(list(other), costs, num_bins).max()
        for other in set(itertools.permutations(sorted(bins)))
    )
    found = np.bincount(bins, costs, num_bins).max()
    assert best <= found <= 1.1 * best


def test_rows_that_share_with_none_cannot_make_any_multiple() -> None:
    for num_rows, possible in ((16, True), (17, False)):
        lengths, none = np.full(num_rows, 90), np.zeros(num_rows, np.int64)
        assert (pack.cut_packed(lengths, none, 0, 100, 8) is not None) == possible


@pytest.mark.parametrize("seed", range(60))
def test_packed_cuts_hold(seed: int) -> None:
    lengths, frames, _ = random_window(seed)
    multiple, budget = (1, 2, 4, 8)[seed % 4], (400, 900, 3000)[seed % 3]
    cut = pack.cut_packed(lengths, frames, FRAME_COST, budget, multiple)
    if cut is None:
        assert len(lengths) < 4 * multiple
        return
    for batch in check_cut(cut, len(lengths), multiple):
        assert int(lengths[batch].sum()) + FRAME_COST * int(frames[batch].sum()) <= budget


def test_packed_needs_no_more_steps_than_tokens_need() -> None:
    lengths, frames, _ = random_window(5, most=20_000)
    costs = lengths + FRAME_COST * frames
    for budget, multiple in ((4000, 4), (8000, 8), (8000, 16)):
        cut = pack.cut_packed(lengths, frames, FRAME_COST, budget, multiple)
        assert cut is not None
        num_steps = len(check_cut(cut, len(lengths), multiple)) // multiple
        assert num_steps <= 1 + -(-costs.sum() // (budget * multiple))


def test_a_bin_may_be_filled_to_the_last_token() -> None:
    cut = pack.cut_packed(np.array([60, 40, 50, 50]), np.zeros(4, np.int64), 0.1, 100, 2)
    assert cut is not None
    order, edges = cut
    assert edges.tolist() == [0, 2, 4]
    assert [set(order[:2].tolist()), set(order[2:].tolist())] == [{0, 1}, {2, 3}]


def test_every_step_has_a_row_for_each_bin() -> None:
    """A few rows near the budget among many small ones: shares of cost alone leave bins empty."""
    lengths = np.array([95, 1, 95, 95, 1, 95, 95, 95, 95, 1, 1, 1])
    cut = pack.cut_packed(lengths, np.zeros(12, np.int64), 0, 100, 4)
    assert cut is not None
    check_cut(cut, 12, 4)


@pytest.mark.parametrize("cost", [26, 34, 51, 90])
def test_awkward_sizes_do_not_take_long(cost: int) -> None:
    """A budget that holds few rows of one size: far more steps than the total cost says."""
    lengths = np.full(20_000, cost)
    cut = pack.cut_packed(lengths, np.zeros(20_000, np.int64), 0, 100, 8)
    assert cut is not None
    batches = check_cut(cut, 20_000, 8)
    assert max(map(len, batches)) == 100 // cost
