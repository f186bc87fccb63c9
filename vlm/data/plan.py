"""The plan: which samples train together, in which order, for ever. A pure function.

1. ``vlm.data.stream`` shuffles rows in blocks of neighbouring shards, anew each epoch.
2. A window is one block of the main stream (vision), plus the text rows that are due by then.
3. ``vlm.data.bucket`` or ``vlm.data.pack`` cuts a window into micro-batches; M consecutive ones
   are one global step.
4. ``assign`` says, last of all, which rank runs which of the M.

The world size is known only to step 4, so every W that divides M trains on the same steps. Each
window follows from its index alone: resuming is a seek, never a replay. Not here: files, decoded
samples, tensors; nor recipes and manifests, which ``vlm.data.planning`` translates.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from vlm.data import bucket, pack, spare
from vlm.data.policy import KINDS, Policy, Rows, check
from vlm.data.position import Position
from vlm.data.stream import MIX, ORDER, SAMPLE, Stream, permutation, philox
from vlm.errors import CheckpointError, ConfigError, DataError

#: raised whenever the same inputs give other steps: a checkpoint must not resume across that
VERSION = 1
_CACHED_WINDOWS = 2


@dataclass(frozen=True, eq=False, slots=True)
class MicroBatch:
    #: (S,) int64 rows of the catalog, in the order in which they are batched
    rows: np.ndarray
    #: (S,) int64 how often each row was shown before: what random numbers of a sample go by
    epochs: np.ndarray
    #: the richest kind among its samples, of ``KINDS``; "text" means that there is no frame
    kind: str
    #: without padding, placeholders of frames included
    num_tokens: int
    num_frames: int
    #: text-only samples
    num_text: int
    #: as executed: in bucketed mode rows are padded to the longest; frames never are
    cost: float


Step = tuple[MicroBatch, ...]


class Planned(NamedTuple):
    """A global step and where it lies."""

    at: Position
    #: where the step after it lies
    next: Position
    epoch: int
    step: Step


@dataclass(frozen=True)
class Summary:
    #: mean of cost without padding / budget over micro-batches
    fill_frac: float
    #: cost of the busiest rank / mean over ranks, averaged over steps
    balance: float
    #: share of text-only samples
    text_frac: float


class Plan:
    """The steps that a policy makes of rows.

    Raises:
        ConfigError: too few samples for M micro-batches, or no text where the policy wants some.
        DataError: no rows, rows not in shard order, or samples that fit no micro-batch.
    """

    def __init__(self, rows: Rows, policy: Policy, fingerprint: str) -> None:
        self.rows = rows
        self.policy = policy
        identity = [VERSION, fingerprint, dataclasses.asdict(policy)]
        text = json.dumps(identity, sort_keys=True)
        self.plan_id = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._main, self._text = _streams(rows, policy)
        self._text_per_main = Fraction(0)
        if self._text is not None:
            share = Fraction(str(policy.text_frac))  # the decimal number that the recipe holds
            self._text_per_main = share / (1 - share)
        self._chosen = self._main.chosen
        if self._text is not None:
            self._chosen = self._chosen | self._text.chosen
        self._cache: dict[int, list[Step]] = {}
        self._check()

    @property
    def num_windows(self) -> int:
        """Windows of one epoch of the main stream."""
        return self._main.num_blocks

    def epoch(self, window: int) -> int:
        return window // self.num_windows

    def window(self, index: int) -> list[Step]:
        """All steps of a window. The last two asked for are kept."""
        assert index >= 0, index
        if index not in self._cache:
            steps = self._plan_window(index)
            while len(self._cache) >= _CACHED_WINDOWS:
                del self._cache[next(iter(self._cache))]
            self._cache[index] = steps
        return self._cache[index]

    def steps_in_window(self, index: int) -> int:
        return len(self.window(index))

    def steps(self, position: Position | None = None) -> Iterator[Planned]:
        """Yields steps without end from ``position`` on."""
        at = position or Position()
        while True:
            steps = self.window(at.window)
            if not 0 <= at.step < len(steps):
                raise CheckpointError(
                    f"data position: step {at.step} of window {at.window}, which has "
                    f"{len(steps)} steps; the position belongs to another plan"
                )
            epoch = self.epoch(at.window)
            for i in range(at.step, len(steps)):
                last = i + 1 == len(steps)
                window, step = (at.window + 1, 0) if last else (at.window, i + 1)
                following = Position(window, step, at.global_step + 1)
                yield Planned(at, following, epoch, steps[i])
                at = following

    def seek(self, global_step: int) -> Position:
        """Where a step lies. Plans every window before it; a kept ``Position`` needs none."""
        index, left = 0, global_step
        while left >= (count := self.steps_in_window(index)):
            index, left = index + 1, left - count
        return Position(index, left, global_step)

    def question_first(self, row: int, epoch: int) -> bool:
        """Whether a sample's question stands before its frames; ``epoch`` of its MicroBatch."""
        return False

    def substitutes(self, row: int, epoch: int) -> Iterator[int]:
        """Rows that may stand in for a bad one, best first; the same on every rank."""
        per_frame, seed = self.policy.tokens_per_frame, self.policy.seed
        return spare.substitutes(self.rows, self._chosen, per_frame, seed, epoch, row)

    def _plan_window(self, index: int) -> list[Step]:
        policy = self.policy
        epoch, block = divmod(index, self.num_windows)
        rows = self._window_rows(epoch, block)
        lengths, frames = self.rows.sizes(rows, policy.tokens_per_frame)
        kinds = self.rows.kind[rows]
        if policy.batching == "bucketed":
            cut = bucket.cut_bucketed(
                lengths, frames, kinds, policy.frame_cost, policy.budget, policy.micro_batches
            )
        else:
            cut = pack.cut_packed(
                lengths, frames, policy.frame_cost, policy.budget, policy.micro_batches
            )
        if cut is None:
            raise ConfigError(
                f"window {index}: {len(rows)} samples do not divide into a multiple of "
                f"data.micro_batches={policy.micro_batches} micro-batches of at most "
                f"data.budget={policy.budget:g} without an empty one; raise data.budget to twice "
                "the cost of a common sample, or lower data.micro_batches"
            )
        epochs = np.full(len(rows), epoch)
        batches = self._micro_batches(rows, epochs, lengths, frames, kinds, cut)
        if policy.batching == "bucketed":
            key = philox(policy.seed, ORDER, epoch, block)
            batches = [batches[i] for i in _spread(key, [b.kind == "text" for b in batches])]
        size = policy.micro_batches
        return [tuple(batches[i : i + size]) for i in range(0, len(batches), size)]

    def _window_rows(self, epoch: int, block: int) -> np.ndarray:
        rows = self._main.block(epoch, block)
        if self._text is None:
            return rows
        before = epoch * self._main.num_rows + self._main.rows_before(epoch, block)
        texts = self._text.take(self._num_text(before), self._num_text(before + len(rows)))
        rows = np.concatenate([rows, texts])
        return rows[permutation(philox(self.policy.seed, MIX, epoch, block), len(rows))]

    def _num_text(self, num_main: int) -> int:
        """Text rows due after so many of the main stream: the nearest to the share there is."""
        return math.floor(num_main * self._text_per_main + Fraction(1, 2))

    def _micro_batches(
        self,
        rows: np.ndarray,
        epochs: np.ndarray,
        lengths: np.ndarray,
        frames: np.ndarray,
        kinds: np.ndarray,
        cut: pack.Cut,
    ) -> list[MicroBatch]:
        order, edges = cut
        starts, sizes = edges[:-1], np.diff(edges)
        tokens = np.add.reduceat(lengths[order], starts)
        sums = np.add.reduceat(frames[order], starts)
        richest = np.maximum.reduceat(kinds[order], starts)
        texts = np.add.reduceat((kinds[order] == 0).astype(np.int64), starts)
        padded = tokens
        if self.policy.batching == "bucketed":
            padded = sizes * np.maximum.reduceat(lengths[order], starts)
        costs = padded + self.policy.frame_cost * sums
        columns = (a.tolist() for a in (starts, edges[1:], richest, tokens, sums, texts, costs))
        own, shown = rows[order], epochs[order]
        return [
            MicroBatch(own[start:stop], shown[start:stop], KINDS[kind], *values)
            for start, stop, kind, *values in zip(*columns, strict=True)
        ]

    def _check(self) -> None:
        policy = self.policy
        num_light = check(self.rows, self._chosen, policy)
        smallest = min(self._main.num_rows, self._main.block_size)
        smallest += self._num_text(smallest)
        if smallest < policy.micro_batches:
            raise ConfigError(
                f"{smallest} samples to train on, but data.micro_batches={policy.micro_batches} "
                f"and none may be empty: at least {policy.micro_batches} samples are needed; add "
                "samples or lower data.micro_batches"
            )
        # Two light samples of a group fit one micro-batch, so where there are plenty the number
        # of micro-batches can be chosen. Where not, try: better to fail here than after hours.
        plenty = 4 * (policy.micro_batches + 16 * len(KINDS))
        if num_light < plenty * self.num_windows:
            for index in range(self.num_windows):
                self.window(index)


def assign(step_costs: Sequence[float], world_size: int) -> list[list[int]]:
    """Which micro-batches of a step each rank runs: exactly M / W, ascending.

    Raises:
        ConfigError: ``world_size`` does not divide M.
    """
    num_batches = len(step_costs)
    if world_size < 1 or num_batches % world_size:
        valid = [str(w) for w in range(1, num_batches + 1) if num_batches % w == 0]
        raise ConfigError(
            f"world size {world_size} does not divide data.micro_batches={num_batches}; start "
            f"{', '.join(valid)} ranks, or change data.micro_batches"
        )
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    for i, rank in enumerate(pack.lpt(step_costs, world_size, num_batches // world_size)):
        ranks[rank].append(i)
    return ranks


def summary(steps: Iterable[Step], policy: Policy, world_size: int) -> Summary:
    """How full micro-batches are and how even ranks, as executed on ``world_size`` ranks."""
    fills, balances = [], []
    num_text = num_samples = 0
    for step in steps:
        costs = [batch.cost for batch in step]
        loads = [sum(costs[i] for i in own) for own in assign(costs, world_size)]
        balances.append(max(loads) * world_size / sum(loads))
        for batch in step:
            real = batch.num_tokens + policy.frame_cost * batch.num_frames
            fills.append(real / policy.budget)
            num_text += batch.num_text
            num_samples += len(batch.rows)
    return Summary(
        fill_frac=math.fsum(fills) / len(fills),
        balance=math.fsum(balances) / len(balances),
        text_frac=num_text / num_samples,
    )


def step_hash(keys: Iterable[str]) -> str:
    """A short name for samples in their order; no two lists of keys run together."""
    digest = hashlib.sha256()
    for key in keys:
        raw = key.encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()[:16]


def sample_rng(seed: int, epoch: int, row: int) -> np.random.Generator:
    """The random numbers of one sample in one epoch, whoever decodes it."""
    return np.random.Generator(philox(seed, SAMPLE, epoch, row))


def _streams(rows: Rows, policy: Policy) -> tuple[Stream, Stream | None]:
    """The main stream, and the text stream where the policy mixes it in."""
    if not len(rows):
        raise DataError("the manifest holds no samples; build it from shards that do")
    if (rows.shard[1:] < rows.shard[:-1]).any():
        raise DataError("the manifest's rows are not in the order of its shards; build it again")
    is_text = rows.kind == 0
    size = max(policy.window, 4 * policy.micro_batches)  # a window feeds every micro-batch
    if is_text.all():
        return Stream(rows.shard, is_text, policy.seed, True, size), None
    main = Stream(rows.shard, ~is_text, policy.seed, False, size)
    if policy.text_frac == 0:
        return main, None
    if not is_text.any():
        raise ConfigError(
            f"data.text_frac={policy.text_frac}, but the manifest holds no text-only samples; "
            "add some or set data.text_frac=0"
        )
    return main, Stream(rows.shard, is_text, policy.seed, True, policy.window)


def _spread(bits: np.random.Philox, is_text: list[bool]) -> list[int]:
    """An order of micro-batches: shuffled, those of text at even distances among the others."""
    order = permutation(bits, len(is_text)).tolist()
    texts = [i for i in order if is_text[i]]
    others = iter([i for i in order if not is_text[i]])
    slots = {(2 * j + 1) * len(order) // (2 * len(texts)): i for j, i in enumerate(texts)}
    return [slots[slot] if slot in slots else next(others) for slot in range(len(order))]
