"""Cuts a window into micro-batches of like rows, for models that pad rows to the longest.

Not here: which rows a window has, and in which order micro-batches run (``vlm.data.plan.plan``).
"""

import heapq
import math
from dataclasses import dataclass

import numpy as np

from vlm.data.plan.pack import Cut


@dataclass(frozen=True)
class _Group:
    """Rows of one kind and frame bucket, the shortest first."""

    #: (g,) positions in the window
    rows: np.ndarray
    #: g lengths, ascending; a list because ``_cut`` reads single values
    lengths: list[int]
    #: g+1 sums of the frames before each row
    frames: list[int]
    #: what the costliest row costs alone
    largest: float
    #: cost without padding
    total: float


def cut_bucketed(
    lengths: np.ndarray,
    frames: np.ndarray,
    kinds: np.ndarray,
    frame_cost: float,
    budget: float,
    multiple: int,
) -> Cut | None:
    """Cuts each group of like rows where the padded cost reaches a common cap.

    1. Group by kind and frame bucket, sort by length; ties stay in the window's order.
    2. Cut at the budget: the fewest micro-batches there can be. Round up to a multiple.
    3. Lower the cap for all groups as far as that number allows, then for each group alone.
    4. Halve the costliest until the number is right (only a few are missing after 3).
    """
    groups = _groups(lengths, frames, kinds, frame_cost)
    fewest = _count(groups, frame_cost, budget)
    num_batches = math.ceil(fewest / multiple) * multiple
    if num_batches > len(lengths):
        return None
    cap = _smallest_cap(groups, frame_cost, budget, num_batches)
    batches = []  # (-cost, group, start, stop): a heap with the costliest first
    for g, group in enumerate(groups):
        num_own = len(_cut(group, frame_cost, cap))
        own_cap = _smallest_cap([group], frame_cost, cap, num_own)
        start = 0
        for stop in _cut(group, frame_cost, own_cap):
            batches.append((-_cost(group, frame_cost, start, stop), g, start, stop))
            start = stop
    _halve(batches, groups, frame_cost, num_batches)
    batches.sort(key=lambda batch: batch[1:])
    order = np.concatenate([group.rows for group in groups])
    edges = np.cumsum([0, *(stop - start for _, _, start, stop in batches)])
    batch_of = np.repeat(np.arange(num_batches), np.diff(edges))
    return order[np.lexsort((order, batch_of))], edges


def fewest(
    lengths: np.ndarray, frames: np.ndarray, kinds: np.ndarray, frame_cost: float, budget: float
) -> int:
    """Micro-batches that the rows need where their number need not be a multiple."""
    return _count(_groups(lengths, frames, kinds, frame_cost), frame_cost, budget)


def _groups(
    lengths: np.ndarray, frames: np.ndarray, kinds: np.ndarray, frame_cost: float
) -> list[_Group]:
    # 1-4 frames share the lowest bucket; from there on each bucket ends at a power of two
    bucket = np.maximum(np.frexp(frames - 1)[1], 2)
    group = kinds.astype(np.int64) << 8 | bucket
    order = np.lexsort((lengths, group))
    firsts = np.flatnonzero(np.diff(group[order])) + 1
    made = []
    for rows in np.split(order, firsts):
        costs = lengths[rows] + frame_cost * frames[rows]
        sums = [0, *np.cumsum(frames[rows]).tolist()]
        total = float(lengths[rows].sum()) + frame_cost * sums[-1]
        made.append(_Group(rows, lengths[rows].tolist(), sums, float(costs.max()), total))
    return made


def _cost(group: _Group, frame_cost: float, start: int, stop: int) -> float:
    """As executed: rows are padded to the longest, frames never are."""
    frames = group.frames[stop] - group.frames[start]
    return (stop - start) * group.lengths[stop - 1] + frame_cost * frames


def _cut(group: _Group, frame_cost: float, cap: float) -> list[int]:
    """Where each micro-batch ends, if each takes all it can. The fewest possible: cost grows with
    every row taken. Neighbours are alike, so the size of the last is a good guess for the next."""
    lengths, frames = group.lengths, group.frames
    num_rows, start, size = len(lengths), 0, 1
    stops = []
    while start < num_rows:
        before = frames[start]
        stop = min(start + size, num_rows)
        while (stop - start) * lengths[stop - 1] + frame_cost * (frames[stop] - before) > cap:
            stop -= 1
        while (
            stop < num_rows
            and (stop + 1 - start) * lengths[stop] + frame_cost * (frames[stop + 1] - before) <= cap
        ):
            stop += 1
        stops.append(stop)
        start, size = stop, stop - start
    return stops


def _count(groups: list[_Group], frame_cost: float, cap: float) -> int:
    return sum(len(_cut(group, frame_cost, cap)) for group in groups)


def _smallest_cap(
    groups: list[_Group], frame_cost: float, enough: float, num_batches: int
) -> float:
    """The lowest cap, to a thousandth, that needs at most ``num_batches``; ``enough`` is one."""
    cap = enough
    low = max(
        max(group.largest for group in groups),
        sum(group.total for group in groups) / num_batches,
    )
    while cap - low > enough / 1000:
        middle = (low + cap) / 2
        if _count(groups, frame_cost, middle) <= num_batches:
            cap = middle
        else:
            low = middle
    return cap


def _halve(
    batches: list[tuple[float, int, int, int]],
    groups: list[_Group],
    frame_cost: float,
    num_batches: int,
) -> None:
    """Splits the costliest of ``batches`` in place until there are enough."""
    heapq.heapify(batches)
    single: list[tuple[float, int, int, int]] = []
    while len(batches) + len(single) < num_batches:
        batch = heapq.heappop(batches)
        _, g, start, stop = batch
        if stop - start == 1:
            single.append(batch)
            continue
        middle = (start + stop) // 2
        for first, last in ((start, middle), (middle, stop)):
            cost = _cost(groups[g], frame_cost, first, last)
            heapq.heappush(batches, (-cost, g, first, last))
    batches += single
