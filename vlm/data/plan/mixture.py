"""The mixture: how many rows of each source every window holds. Exact, and by arithmetic alone.

1. A source has two streams: its samples with frames (main), and its text-only ones (text).
2. Of an epoch of the main streams each source has an amount: its size, or its share by weight.
3. A window takes the next rows of each main stream, in proportion to the amounts, then as many of
   the text streams as ``text_frac`` asks for by then. Positions are rounded, never added up.
4. Where weights change a phase begins: with a window of its own, at the very step asked for.

Not here: what becomes of a window's rows (``vlm.data.plan.plan``).
"""

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from vlm.data.plan.policy import Policy, Rows, check
from vlm.data.plan.shares import Half, amounts, decimal, halves
from vlm.data.plan.stream import MIX, TRIAL, Stream, num_parts, permutation, philox
from vlm.errors import DataError

_TRIAL_ROWS = 1 << 15

#: of a sample of rows: budget spent on them / their cost, and the deviation of their cost / mean
Trial = Callable[[np.ndarray], tuple[float, float]]


@dataclass(frozen=True)
class _Shares:
    """What each stream has of its half of the samples, under constant weights."""

    #: rows of the main streams in an epoch
    epoch_rows: Fraction
    main: list[Fraction]
    text: list[Fraction]
    text_per_main: Fraction


@dataclass(frozen=True)
class Phase:
    """A time of constant weights."""

    #: its first global step; its windows are numbered from there on, since each has a step
    first_step: int
    #: where the next one begins; None: never
    stop_step: int | None
    first_epoch: Fraction
    #: where each stream is when the phase begins
    main_starts: list[int]
    text_starts: list[int]
    shares: _Shares
    #: rows of the main streams in a window, and windows in an epoch; its last window differs
    window_rows: int
    num_windows: int
    rows_per_step: float

    def holds(self, global_step: int) -> bool:
        until = math.inf if self.stop_step is None else self.stop_step
        return self.first_step <= global_step < until

    def positions(self, window: int) -> tuple[list[int], list[int]]:
        """Where each main and each text stream is when a window begins."""
        epoch, index = divmod(window - self.first_step, self.num_windows)
        return self._after(epoch * self.shares.epoch_rows + index * self.window_rows)

    def next(self, stop_step: int | None, shares: _Shares, size: tuple[int, float]) -> "Phase":
        """The phase after this one, where other weights hold."""
        assert self.stop_step is not None
        # Where streams will be is estimated, not counted: that would take planning all windows
        # up to here whenever a run goes on.
        rows = Fraction((self.stop_step - self.first_step) * self.rows_per_step)
        passed = rows / (1 + self.shares.text_per_main)
        epoch = self.first_epoch + passed / self.shares.epoch_rows
        return _phase(self.stop_step, stop_step, epoch, self._after(passed), shares, size)

    def _after(self, rows: Fraction) -> tuple[list[int], list[int]]:
        """Positions after so many rows of the main streams."""
        own = [_round(rows * share) for share in self.shares.main]
        num_text = _round(sum(own) * self.shares.text_per_main)
        text = [_round(num_text * share) for share in self.shares.text]
        return _add(self.main_starts, own), _add(self.text_starts, text)


class Mixture:
    """The rows of each window.

    Raises:
        ConfigError: weights, caps or shares that cannot be met.
        DataError: no rows, rows not in shard order, or such as no micro-batch can hold.
    """

    def __init__(self, rows: Rows, policy: Policy, trial: Trial) -> None:
        if not len(rows):
            raise DataError("the manifest holds no samples; build it from shards that do")
        self._policy = policy
        main, text = halves(rows, policy)
        #: (n,) bool, the rows that may be trained on
        self.chosen = np.zeros(len(rows), bool)
        for half in (*main, *text):
            self.chosen[_own(half)] |= half.chosen
        #: how many of them cost at most half the budget
        self.num_light = check(rows, self.chosen, policy)
        self.phases = _phases(main, text, policy, trial)
        first = self.phases[0]
        # a block is what a window takes of a stream, so that reading stays near few shards
        self._main = [
            _stream(rows, half, policy, first.window_rows * share, is_text=False)
            for half, share in zip(main, first.shares.main, strict=True)
        ]
        window_text = first.window_rows * first.shares.text_per_main
        self._text = [
            _stream(rows, half, policy, window_text * share, is_text=True)
            for half, share in zip(text, first.shares.text, strict=True)
        ]

    def phase(self, window: int) -> Phase:
        """The phase of a window, or of a global step."""
        firsts = [phase.first_step for phase in self.phases]
        return self.phases[bisect.bisect_right(firsts, window) - 1]

    def epoch(self, window: int) -> int:
        phase = self.phase(window)
        return math.floor(phase.first_epoch) + (window - phase.first_step) // phase.num_windows

    def rows(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a window in their order, and how often each was shown before; int64."""
        phase = self.phase(window)
        starts, stops = phase.positions(window), phase.positions(window + 1)
        found = [
            stream.take(start, stop)
            for streams, *ranges in zip((self._main, self._text), starts, stops, strict=True)
            for stream, start, stop in zip(streams, *ranges, strict=True)
        ]
        rows, epochs = (np.concatenate(parts) for parts in zip(*found, strict=True))
        order = permutation(philox(self._policy.seed, MIX, 0, window), len(rows))
        return rows[order], epochs[order]

    def num_rows(self, window: int) -> int:
        phase = self.phase(window)
        starts, stops = phase.positions(window), phase.positions(window + 1)
        return sum(map(sum, stops)) - sum(map(sum, starts))


def _round(number: Fraction) -> int:
    return math.floor(number + Fraction(1, 2))


def _add(first: Sequence[int], second: Sequence[int]) -> list[int]:
    return [a + b for a, b in zip(first, second, strict=True)]


def _own(half: Half) -> slice:
    return slice(half.first_row, half.first_row + len(half.chosen))


def _stream(rows: Rows, half: Half, policy: Policy, size: Fraction, *, is_text: bool) -> Stream:
    return Stream(
        rows.shard[_own(half)],
        half.chosen,
        first_row=half.first_row,
        source=half.source,
        seed=policy.seed,
        is_text=is_text,
        block_rows=_round(size) or policy.window,
    )


def _phases(main: list[Half], text: list[Half], policy: Policy, trial: Trial) -> list[Phase]:
    weights = tuple(source.weight for source in policy.sources)
    steps = [0, *(step for step, _ in policy.weights_at), None]
    shares = [
        _shares(main, text, own, policy) for own in (weights, *dict(policy.weights_at).values())
    ]
    sizes = [_window(main, text, one, policy, trial) for one in shares]
    begin = [0] * len(main), [0] * len(text)
    found = [_phase(0, steps[1], Fraction(0), begin, shares[0], sizes[0])]
    for stop, own, size in zip(steps[2:], shares[1:], sizes[1:], strict=True):
        found.append(found[-1].next(stop, own, size))
    return found


def _phase(
    first_step: int,
    stop_step: int | None,
    first_epoch: Fraction,
    starts: tuple[list[int], list[int]],
    shares: _Shares,
    size: tuple[int, float],
) -> Phase:
    window_rows, rows_per_step = size
    num_windows = num_parts(math.floor(shares.epoch_rows), window_rows)
    return Phase(
        first_step, stop_step, first_epoch, *starts, shares, window_rows, num_windows, rows_per_step
    )


def _shares(
    main: list[Half], text: list[Half], weights: Sequence[float | None], policy: Policy
) -> _Shares:
    own = amounts(main, weights, policy)
    total = sum(own, Fraction(0))
    ratio, texts = Fraction(0), []
    if text:
        ratio = decimal(policy.text_frac) / (1 - decimal(policy.text_frac))
        texts = amounts(text, weights, policy, total * ratio)
    return _Shares(
        total, [one / total for one in own], [one / (total * ratio) for one in texts], ratio
    )


def _window(
    main: list[Half], text: list[Half], shares: _Shares, policy: Policy, trial: Trial
) -> tuple[int, float]:
    """Rows of the main streams in a window, and rows of all streams in a step.

    The last step of a window is as full as the others where the window's cost is known well
    enough to end it there; else half a step is lost in the mean.
    """
    size = max(policy.window, 4 * policy.micro_batches)  # it feeds every micro-batch
    of_text = [share * shares.text_per_main for share in shares.text]
    parts = [*zip((*main, *text), (*shares.main, *of_text), strict=True)]
    whole = 1 + shares.text_per_main
    overhead, deviation = trial(np.concatenate([_draw(*part, policy) for part in parts]))
    tokens = sum(Fraction(half.num_tokens, half.num_rows) * share for half, share in parts) / whole
    frames = sum(Fraction(half.num_frames, half.num_rows) * share for half, share in parts) / whole
    cost = (float(tokens) + policy.frame_cost * float(frames)) * overhead
    rows_per_step = policy.micro_batches * policy.budget / cost
    main_per_step = rows_per_step / float(whole)
    num_steps = math.ceil(size / main_per_step)
    spread = 3 * deviation / math.sqrt(size)
    if spread < 0.5 / num_steps:
        size = math.floor(main_per_step * num_steps * (1 - spread))
    return size, rows_per_step


def _draw(half: Half, share: Fraction, policy: Policy) -> np.ndarray:
    """Rows drawn at random, as many as the share of the half."""
    size = len(half.chosen)
    count = _round(_TRIAL_ROWS * share) * size // half.num_rows + 1
    bits = philox(policy.seed, TRIAL, 0, half.first_row, half.source)
    rows = (bits.random_raw(count) % np.uint64(size)).astype(np.int64)
    return rows[half.chosen[rows]] + half.first_row
