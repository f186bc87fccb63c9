"""Cuts a window into micro-batches of any rows that cost the same, for models that do not pad.

``lpt`` also shares out the micro-batches of a step among ranks. Not here: which rows a window has,
and in which order micro-batches run (``vlm.data.plan.plan``).
"""

import heapq
import math
from collections.abc import Sequence

import numpy as np

#: packed costs are whole numbers of this fraction of a token: sums are exact in any order
_UNITS_PER_TOKEN = 1024
#: budget / cost of bins that many rows fill
OVERHEAD = 1.002

#: ``order`` (n,) and ``edges`` (K+1,): micro-batch i of K holds the positions
#: ``order[edges[i]:edges[i+1]]`` of the window's n rows, ascending. K is a multiple of M, no
#: micro-batch is empty, none costs more than the budget.
Cut = tuple[np.ndarray, np.ndarray]


def lpt(costs: Sequence[float], num_bins: int, bin_size: int | None = None) -> list[int]:
    """The bin of each item: longest processing time first, ties to the lower index.

    Args:
        costs: Positive, one per item.
        num_bins: How many bins share them.
        bin_size: With it a bin takes exactly so many items, ``len(costs) / num_bins``.
    """
    assert bin_size is None or bin_size * num_bins == len(costs)
    bin_of = [0] * len(costs)
    room = [bin_size or len(costs)] * num_bins
    heap = [(0.0, b) for b in range(num_bins)]
    for item in sorted(range(len(costs)), key=costs.__getitem__, reverse=True):
        load, target = heap[0]
        bin_of[item] = target
        room[target] -= 1
        if room[target]:
            heapq.heapreplace(heap, (load + costs[item], target))
        else:
            heapq.heappop(heap)
    return bin_of


def cut_packed(
    lengths: np.ndarray, frames: np.ndarray, frame_cost: float, budget: float, multiple: int
) -> Cut | None:
    """Cuts the window into steps, and each step into M bins that cost the same.

    1. Even steps, as few as there can be. Where a bin holds many rows they fit at once.
    2. Else full steps: each takes as many of the next rows as fit. The last few, which the end of
       the window left short, are cut evenly again.
    """
    exact = (lengths + frame_cost * frames) * _UNITS_PER_TOKEN
    costs = np.ceil(exact).astype(np.int64)  # up, so that what fits here fits in tokens too
    room = math.floor(budget * _UNITS_PER_TOKEN)
    if cut := _cut_evenly(costs, room, multiple, tries=2):
        return cut
    if _fewest_bins(costs, room) > len(costs) // multiple * multiple:
        return None
    stops = [0, *_full_stops(costs, room, multiple)]
    num_last = 2
    while num_last < len(stops) - 1:
        start = stops[-num_last - 1]
        last = _cut_evenly(costs[start:], room, multiple)
        if last is not None:
            full = np.split(np.arange(start), stops[1 : -num_last - 1])
            first = _pack_steps(costs, full, room, multiple)
            assert first is not None, "a full step is one that fits"
            order = np.concatenate([first[0], start + last[0]])
            return order, np.concatenate([first[1], start + last[1][1:]])
        num_last *= 4
    return _cut_evenly(costs, room, multiple)


def _cut_evenly(
    costs: np.ndarray, room: int, multiple: int, tries: int | None = None
) -> Cut | None:
    """Cuts into even steps; adds steps until every bin fits."""
    most = len(costs) // multiple
    num_steps = math.ceil(_fewest_bins(costs, room) / multiple)
    while num_steps <= most and tries != 0:
        cut = _pack_steps(costs, _even_steps(costs, num_steps, multiple), room, multiple)
        if cut is not None or num_steps == most:
            return cut
        num_steps = min(most, max(num_steps + 1, num_steps * 1003 // 1000))
        tries = None if tries is None else tries - 1
    return None


def _full_stops(costs: np.ndarray, room: int, multiple: int) -> list[int]:
    """Where each step ends, if each takes as many of the next rows as fit its M bins.

    Looks near the size of the step before, in growing strides, then halves what is left between
    the largest size that fits and the smallest that does not.
    """
    sums = np.concatenate([[0], np.cumsum(costs)])
    values = costs.tolist()
    start, size = 0, multiple
    stops = []
    while start < len(values):
        low = min(start + multiple, len(values))  # one row in each bin always fits
        high = int(np.searchsorted(sums, sums[start] + room * multiple, "right")) - 1
        high = max(low, high)
        probe, stride = min(max(start + size, low), high), 1
        fitted = failed = False
        while low < high:
            if _fits(values[start:probe], room, multiple):
                low, fitted = probe, True
            else:
                high, failed = probe - 1, True
            if fitted and failed:
                probe = (low + high + 1) // 2
            else:
                probe = min(low + stride, high) if fitted else max(high - stride, low)
                stride *= 2
        stops.append(low)
        start, size = low, low - start
    return stops


def _fits(costs: list[int], room: int, multiple: int) -> bool:
    loads = np.bincount(lpt(costs, multiple), costs, multiple)
    return bool(loads.max() <= room)


def _fewest_bins(costs: np.ndarray, room: int) -> int:
    """No fewer will do: of rows above a k-th of the room, at most k - 1 share a bin."""
    by_total = math.ceil(int(costs.sum()) / room)
    by_count = (math.ceil((k * costs > room).sum() / (k - 1)) for k in range(2, 17))
    return max(by_total, *by_count)


def _even_steps(costs: np.ndarray, num_steps: int, multiple: int) -> list[np.ndarray]:
    """The positions of each step, ascending, at even shares of the cost.

    The heavier half is cut first and the lighter half then makes good what each cut missed by,
    so that steps differ by a light row at most. Where rows are few, one cut through all leaves
    each step at least M of them.
    """
    shares = np.arange(1, num_steps) * (float(costs.sum()) / num_steps)
    if len(costs) < 4 * num_steps * multiple:
        least = np.arange(1, num_steps) * multiple
        stops = np.maximum.accumulate(np.maximum(_nearest(costs, shares) - least, 0)) + least
        return np.split(np.arange(len(costs)), np.minimum(stops, len(costs) - least[::-1]))
    is_heavy = costs > np.median(costs)
    heavy, light = np.flatnonzero(is_heavy), np.flatnonzero(~is_heavy)
    sums = np.concatenate([[0], np.cumsum(costs[heavy])])
    heavy_stops = _nearest(costs[heavy], shares * (sums[-1] / costs.sum()))
    light_stops = np.maximum.accumulate(_nearest(costs[light], shares - sums[heavy_stops]))
    halves = zip(np.split(heavy, heavy_stops), np.split(light, light_stops), strict=True)
    return [np.sort(np.concatenate(half)) for half in halves]


def _nearest(costs: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """How many of ``costs``, from the first on, add up to about each of ``sums``."""
    return np.searchsorted(np.cumsum(costs) - costs / 2, sums)


def _pack_steps(costs: np.ndarray, steps: list[np.ndarray], room: int, multiple: int) -> Cut | None:
    """Shares out the rows of each step among M bins; None where they do not fit."""
    sizes = [len(rows) for rows in steps]
    sums = [int(costs[rows].sum()) for rows in steps]
    if min(sizes) < multiple or max(sums) > room * multiple:
        return None
    orders, counts = [], []
    for rows, bin_of, most in zip(steps, *_fold(costs, steps, multiple), strict=True):
        if most > room:
            bin_of = np.asarray(lpt(costs[rows].tolist(), multiple))
            if np.bincount(bin_of, costs[rows], multiple).max() > room:
                return None
        orders.append(rows[np.argsort(bin_of, kind="stable")])
        counts.append(np.bincount(bin_of, minlength=multiple))
    return np.concatenate(orders), np.cumsum(np.concatenate([[0], *counts]))


def _fold(
    costs: np.ndarray, steps: list[np.ndarray], multiple: int
) -> tuple[list[np.ndarray], list[int]]:
    """Longest first by rounds, all steps at once: each bin takes one row a round, the fullest the
    lightest. As even as ``lpt`` where a bin takes many rows, and far faster.

    Returns:
        The bin of each row of each step, and the fullest bin of each step.
    """
    num_rounds = -(-max(map(len, steps)) // multiple)
    padded = np.zeros((len(steps), num_rounds * multiple), np.int64)
    for i, rows in enumerate(steps):
        padded[i, : len(rows)] = costs[rows]
    order = np.argsort(-padded, axis=1, kind="stable")
    ranked = np.take_along_axis(padded, order, axis=1)
    loads = np.zeros((len(steps), multiple), np.int64)
    bins = np.empty_like(order)
    for start in range(0, num_rounds * multiple, multiple):
        emptiest = np.argsort(loads, axis=1, kind="stable")
        here = slice(start, start + multiple)
        np.put_along_axis(bins, order[:, here], emptiest, axis=1)
        own = np.take_along_axis(loads, emptiest, axis=1) + ranked[:, here]
        np.put_along_axis(loads, emptiest, own, axis=1)
    return [bins[i, : len(rows)] for i, rows in enumerate(steps)], loads.max(axis=1).tolist()
