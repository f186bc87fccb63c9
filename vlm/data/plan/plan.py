"""The plan: which samples train together, in which order, for ever. A pure function.

1. ``vlm.data.plan.stream`` shuffles each source's rows in blocks of neighbouring shards, anew each
   pass.
2. ``vlm.data.plan.mixture`` says how many rows of which stream a window holds.
3. ``vlm.data.plan.bucket`` or ``vlm.data.plan.pack`` cuts a window into micro-batches; M
   consecutive ones are one global step.
4. ``assign`` says, last of all, which rank runs which of the M.

The world size is known only to step 4, so every W that divides M trains on the same steps. Each
window follows from its index alone: resuming is a seek, never a replay. Not here: files, decoded
samples, tensors; nor recipes and manifests, which ``vlm.data.plan.planning`` translates.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vlm.data.plan import bucket, pack, spare
from vlm.data.plan.mixture import Mixture
from vlm.data.plan.policy import KINDS, Policy, Rows
from vlm.data.plan.position import Position
from vlm.data.plan.shares import decimal
from vlm.data.plan.stream import ORDER, QUESTION, SAMPLE, permutation, philox
from vlm.errors import CheckpointError, ConfigError

#: raised whenever the same inputs give other steps: a checkpoint must not resume across that
VERSION = 2
_CACHED_WINDOWS = 2
#: steps whose micro-batches are sorted by cost together
_ALIKE_STEPS = 8


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

    Args:
        fingerprints: Of the manifests, in the order of ``policy.sources``.

    Raises:
        ConfigError: too few samples for M micro-batches, or shares that cannot be met.
        DataError: no rows, rows not in shard order, or samples that fit no micro-batch.
    """

    def __init__(self, rows: Rows, policy: Policy, fingerprints: Sequence[str]) -> None:
        assert len(policy.sources) == len(fingerprints) == len(rows.first_rows) - 1
        self.rows = rows
        self.policy = policy
        #: all that makes this plan what it is, as JSON holds it
        self.identity = identity(policy, fingerprints)
        text = json.dumps(self.identity, sort_keys=True)
        self.plan_id = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.mixture = Mixture(rows, policy, self._try)
        #: steps of each window that was planned; who knows more may add to it, and ``seek`` is fast
        self.num_steps: dict[int, int] = {}
        self._cache: dict[int, list[Step]] = {}
        self._check()

    @property
    def num_windows(self) -> int:
        """Windows of an epoch, until weights change."""
        return self.mixture.phases[0].num_windows

    def epoch(self, window: int) -> int:
        return self.mixture.epoch(window)

    def window(self, index: int) -> list[Step]:
        """All steps of a window. The last two asked for are kept."""
        assert index >= 0, index
        if index not in self._cache:
            steps = self._plan_window(index)
            while len(self._cache) >= _CACHED_WINDOWS:
                del self._cache[next(iter(self._cache))]
            self._cache[index] = steps
            self.num_steps[index] = len(steps)
        return self._cache[index]

    def steps_in_window(self, index: int) -> int:
        return self.num_steps[index] if index in self.num_steps else len(self.window(index))

    def steps(self, position: Position | None = None) -> Iterator[Planned]:
        """Yields steps without end from ``position`` on."""
        at = position or Position()
        while True:
            steps, phase = self.window(at.window), self.mixture.phase(at.window)
            if not (0 <= at.step < len(steps) and phase.holds(at.global_step)):
                raise CheckpointError(
                    f"data position: step {at.step} of window {at.window} (step {at.global_step} "
                    f"of all), which has {len(steps)} steps; the position belongs to another plan"
                )
            epoch = self.epoch(at.window)
            for i in range(at.step, len(steps)):
                following = Position(at.window, i + 1, at.global_step + 1)
                if i + 1 == len(steps):
                    following = Position(at.window + 1, 0, at.global_step + 1)
                if following.global_step == phase.stop_step:
                    following = Position(phase.stop_step, 0, phase.stop_step)
                yield Planned(at, following, epoch, steps[i])
                at = following
                if at.step == 0:
                    break

    def seek(
        self, global_step: int, progress: Callable[[int, int], None] | None = None
    ) -> Position:
        """Where a step lies. Plans every window before it whose ``num_steps`` is not known; a kept
        ``Position`` needs none.

        Args:
            progress: Called with (steps passed, ``global_step``) after each window.
        """
        index = self.mixture.phase(global_step).first_step
        left = global_step - index
        while left >= (count := self.steps_in_window(index)):
            index, left = index + 1, left - count
            if progress is not None:
                progress(global_step - left, global_step)
        return Position(index, left, global_step)

    def question_first(self, row: int, epoch: int) -> bool:
        """Whether a sample's question stands before its frames; ``epoch`` of its MicroBatch."""
        if not self.policy.question_first_frac:
            return False
        share = decimal(self.policy.question_first_frac)
        drawn = int(philox(self.policy.seed, QUESTION, epoch, row).random_raw(1)[0])
        return drawn < share * 2**64

    def substitutes(self, row: int, epoch: int) -> Iterator[int]:
        """Rows that may stand in for a bad one, best first; the same on every rank."""
        per_frame, seed = self.policy.tokens_per_frame, self.policy.seed
        return spare.substitutes(self.rows, self.mixture.chosen, per_frame, seed, epoch, row)

    def _plan_window(self, index: int) -> list[Step]:
        policy = self.policy
        rows, epochs = self.mixture.rows(index)
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
        batches = self._micro_batches(rows, epochs, lengths, frames, kinds, cut)
        size = policy.micro_batches
        if policy.batching == "bucketed":
            bits = philox(policy.seed, ORDER, 0, index)
            order = _order(
                bits, [b.kind == "text" for b in batches], [b.cost for b in batches], size
            )
            batches = [batches[i] for i in order]
        return [tuple(batches[i : i + size]) for i in range(0, len(batches), size)]

    def _try(self, rows: np.ndarray) -> tuple[float, float]:
        """Budget spent on rows / their cost, and the deviation of their cost / its mean."""
        policy = self.policy
        lengths, frames = self.rows.sizes(rows, policy.tokens_per_frame)
        costs = lengths + policy.frame_cost * frames
        overhead = pack.OVERHEAD
        if policy.batching == "bucketed":
            kinds = self.rows.kind[rows]
            num = bucket.fewest(lengths, frames, kinds, policy.frame_cost, policy.budget)
            overhead = num * policy.budget / float(costs.sum())
        return overhead, float(costs.std() / costs.mean())

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
        windows = [p.first_step + w for p in self.mixture.phases for w in range(p.num_windows)]
        smallest = min(map(self.mixture.num_rows, windows))
        if smallest < policy.micro_batches:
            raise ConfigError(
                f"{smallest} samples to train on, but data.micro_batches={policy.micro_batches} "
                f"and none may be empty: at least {policy.micro_batches} samples are needed; add "
                "samples or lower data.micro_batches"
            )
        # Two light samples of a group fit one micro-batch, so where there are plenty the number
        # of micro-batches can be chosen. Where not, try: better to fail here than after hours.
        plenty = 4 * (policy.micro_batches + 16 * len(KINDS))
        if self.mixture.num_light < plenty * self.num_windows:
            for index in windows:
                self.window(index)


def identity(policy: Policy, fingerprints: Sequence[str]) -> dict[str, Any]:
    """What ``plan_id`` is a hash of; two of them show why plans differ."""
    found = json.loads(json.dumps(dataclasses.asdict(policy)))  # a tuple is a list in JSON
    sources = {
        source.pop("name"): {**source, "fingerprint": fingerprint}
        for source, fingerprint in zip(found["sources"], fingerprints, strict=True)
    }
    return {"version": VERSION, **found, "sources": sources}


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


def _order(
    bits: np.random.Philox, is_text: Sequence[bool], costs: Sequence[float], size: int
) -> list[int]:
    """An order of micro-batches for steps of ``size``: shuffled, those of text at even distances.

    A few steps at a time, those that cost alike are put together, or ranks would wait.
    """
    order = permutation(bits, len(is_text)).tolist()
    texts = [i for i in order if is_text[i]]
    others = [i for i in order if not is_text[i]]
    slots = {(2 * j + 1) * len(order) // (2 * len(texts)) for j in range(len(texts))}
    place = [slot in slots for slot in range(len(order))]
    found: list[int] = []
    span = _ALIKE_STEPS * size
    for start in range(0, len(order), span):
        own = place[start : start + span]
        num_text = sum(own)
        parts = {True: texts[:num_text], False: others[: len(own) - num_text]}
        texts, others = texts[num_text:], others[len(own) - num_text :]
        alike = {key: iter(sorted(part, key=costs.__getitem__)) for key, part in parts.items()}
        found += [next(alike[key]) for key in own]
    steps = permutation(bits, len(order) // size).tolist()
    return [i for step in steps for i in found[step * size : (step + 1) * size]]
