"""From the plan's steps to micro-batches in memory, ahead of the training step.

1. Each rank plans every global step and keeps the micro-batches that are its own.
2. Ranges of remote shards are asked for ahead of their turn (``vlm.data.storage.ahead``).
3. Threads of this process load samples, some at a time, each straight into its place in the memory
   of a micro-batch (``vlm.data.load.samples``); decoders release the interpreter lock. No thread
   waits for the end of a micro-batch: the samples of the next ones are queued already.
4. One thread joins what is ready, in the order of the plan. A bad sample is replaced by the plan's
   first substitute that is good, and counted.

What comes out depends on the plan, the position and the bytes of the shards alone, not on threads
or ranks.
"""

import contextlib
import dataclasses
import itertools
import logging
import queue
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from vlm.batch import Batch
from vlm.config import DataConfig, StorageConfig
from vlm.data.load.collate import Collator, frame_size
from vlm.data.load.faults import BadSamples
from vlm.data.load.reader import Reader
from vlm.data.load.samples import Loaded, Samples, Wanted
from vlm.data.load.slabs import Slabs
from vlm.data.plan import plan
from vlm.data.plan.catalog import Catalog
from vlm.data.plan.plan import MicroBatch, Plan, Planned
from vlm.data.plan.position import Position
from vlm.data.storage import remote
from vlm.data.storage.ahead import Fetches, Range, ReadAhead
from vlm.data.storage.cache import RangeCache
from vlm.data.storage.storage import Patience, Storage
from vlm.errors import DataError, TransientError

log = logging.getLogger(__name__)

#: the watchdog says what is waited for, this often
WATCH_S = 30.0
#: frames of a part at most, or samples that have none: what a thread loads at a time
MAX_PART = 192


class LoadedStep(NamedTuple):
    """One rank's share of a global step."""

    #: where the next step lies
    next: Position
    epoch: int
    batches: list[Batch]
    #: the whole step, of all ranks
    plan: plan.Step
    #: rows that this rank has found bad by now, those it was started with among them
    quarantine: tuple[int, ...]


class _Share(NamedTuple):
    """This rank's micro-batches of a step."""

    planned: Planned
    micros: list[MicroBatch]


class _Pending(NamedTuple):
    """A micro-batch whose samples are being read."""

    micro: MicroBatch
    #: (F, H, W, 3) uint8, filled by the futures; each sample owns as many frames as planned
    slab: torch.Tensor
    #: (F, C, h, w) float16, filled alike; None where none are wanted
    latents: torch.Tensor | None
    first_frames: list[int]
    parts: list[Future[list[Loaded]]]


class Loader:
    """Iterates over this rank's micro-batches, one global step at a time, without end.

    Args:
        quarantine: Rows found bad before, of a ``LoaderState``.
        pinned: Batches lie in page-locked memory, for a GPU.
        bad_samples: File that names every bad sample; None for none.
        references: (rows, 2) of pairs of answers, see ``Batch.reference``; None: not known yet.
        dpo_beta: see ``Batch.dpo_beta``.
    """

    def __init__(
        self,
        catalog: Catalog,
        plan: Plan,
        collator: Collator,
        config: DataConfig,
        *,
        rank: int,
        world_size: int,
        position: Position | None = None,
        quarantine: Iterable[int] = (),
        pinned: bool = False,
        bad_samples: Path | None = None,
        references: np.ndarray | None = None,
        dpo_beta: float = 0.0,
    ) -> None:
        self._references, self._dpo_beta = references, dpo_beta
        self._catalog, self._plan, self._collator = catalog, plan, collator
        self._config, self._rank, self._world_size = config, rank, world_size
        self._position = position or Position()
        self._bad_file, self._quarantine = bad_samples, tuple(quarantine)
        self._pinned, self._slabs = pinned, Slabs(pinned)
        self._reader = Reader(catalog, open_storage(config.storage, catalog))
        self._samples = Samples(catalog, plan, collator, self._reader)
        self._any_remote = any_remote(catalog)
        # every rank must call the tower alike, so a blank frame is as large as the others
        self._size = frame_size(catalog)

    def __iter__(self) -> Iterator[LoadedStep]:
        """Prepares ``prefetch`` micro-batches ahead; an error comes out at its own step."""
        self._reader.storage.reopen()
        ready: queue.Queue[LoadedStep | BaseException] = queue.Queue(1)
        stop = threading.Event()
        worker = threading.Thread(target=self._produce, args=(ready, stop), daemon=True)
        worker.start()
        try:
            while True:
                item = self._watch(ready)
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            self._reader.close()
            worker.join(WATCH_S)
            if worker.is_alive():
                log.warning("leaving behind a read of %s", self._reader.storage.waits.describe())

    def _watch(self, ready: queue.Queue) -> LoadedStep | BaseException:
        """The next item; says what is waited for, and gives up long after every read should."""
        storage = self._reader.storage
        limit_s = 2 * storage.patience.give_up_s + 10 * WATCH_S
        for waited in itertools.count(1):
            try:
                return ready.get(timeout=WATCH_S)
            except queue.Empty:
                what = storage.waits.describe()
                log.warning("no batch for %.0f s; waiting for %s", waited * WATCH_S, what)
                if waited * WATCH_S > limit_s:
                    raise TransientError(f"no batch for {limit_s:.0f} s; hung at {what}") from None
        raise AssertionError

    def _produce(self, ready: queue.Queue, stop: threading.Event) -> None:
        def put(item: object) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.2)
                except queue.Full:
                    continue

        bad = BadSamples(self._catalog, self._config.max_bad_frac, self._bad_file, self._quarantine)
        pool = ThreadPoolExecutor(self._config.decode_threads, "decode")
        try:
            with contextlib.closing(self._pending_steps(pool, bad, stop)) as steps:
                for planned, pending in steps:
                    batches = [self._join(one, planned, bad) for one in pending]
                    step = planned.step
                    put(LoadedStep(planned.next, planned.epoch, batches, step, bad.quarantine))
        except BaseException as error:
            put(error)
        finally:
            # a read that hangs must not keep whoever closes the loader
            pool.shutdown(
                wait=not self._reader.storage.waits.num_hanging(WATCH_S), cancel_futures=True
            )

    def _pending_steps(
        self, pool: ThreadPoolExecutor, bad: BadSamples, stop: threading.Event
    ) -> Generator[tuple[Planned, list[_Pending]]]:
        """Steps whose samples are on their way, ``prefetch`` micro-batches of them at a time."""
        config = self._config
        ahead = ReadAhead(
            self._reader.storage,
            self._remote_ranges,
            config.storage.connections,
            _ahead_bytes(config.storage),
        )
        waiting: deque[tuple[Planned, list[_Pending]]] = deque()
        num_steps = max(1, config.prefetch * self._world_size // config.micro_batches)
        with contextlib.closing(ahead(self._shares())) as shares:
            for share, fetches in shares:
                if stop.is_set():
                    return
                waiting.append(
                    (share.planned, [self._start(m, fetches, pool, bad) for m in share.micros])
                )
                if len(waiting) > num_steps:
                    yield waiting.popleft()

    def _shares(self) -> Iterator[_Share]:
        for planned in self._plan.steps(self._position):
            costs = [batch.cost for batch in planned.step]
            mine = plan.assign(costs, self._world_size)[self._rank]
            yield _Share(planned, [planned.step[index] for index in mine])

    def _remote_ranges(self, share: _Share) -> Iterator[Range]:
        if self._any_remote:
            for micro in share.micros:
                for row in micro.rows.tolist():
                    if found := self._reader.remote_range(row):
                        yield found

    def _start(
        self, micro: MicroBatch, fetches: Fetches, pool: ThreadPoolExecutor, bad: BadSamples
    ) -> _Pending:
        """Queues the samples of a micro-batch, cut into parts for all threads."""
        counts = self._plan.rows.num_frames[micro.rows].tolist()
        firsts = list(itertools.accumulate(counts, initial=0))
        slab = self._slabs.take((max(1, firsts[-1]), *self._size, 3))
        pixels, shape = slab.numpy(), self._collator.latent_shape
        latents = None if shape is None else torch.zeros(len(slab), *shape, dtype=torch.float16)
        own = None if latents is None else latents.numpy()
        wanted = [
            Wanted(row, epoch, pixels[first:last], None if own is None else own[first:last])
            for row, epoch, (first, last) in zip(
                micro.rows.tolist(), micro.epochs.tolist(), itertools.pairwise(firsts), strict=True
            )
        ]
        parts = [
            pool.submit(self._samples.load, wanted[first:last], fetches, bad)
            for first, last in cut(counts, self._config.decode_threads)
        ]
        return _Pending(micro, slab, latents, firsts, parts)

    def _join(self, pending: _Pending, planned: Planned, bad: BadSamples) -> Batch:
        """A batch of samples that are ready, in the order of the plan."""
        samples = [sample for part in pending.parts for sample in part.result()]
        where = f"rank {self._rank}, epoch {planned.epoch}, step {planned.at.global_step}"
        for row, sample in zip(pending.micro.rows.tolist(), samples, strict=True):
            bad.record(row, sample.row, sample.faults, where)
        frames, latents, kind = pending.slab, pending.latents, pending.micro.kind
        counts = [sample.num_frames for sample in samples]
        if sum(counts) not in (len(frames), 0):  # substitutes are shorter: close the gaps
            starts = pending.first_frames
            kept = [slice(s, s + n) for s, n in zip(starts, counts, strict=False)]
            frames = torch.cat([frames[own] for own in kept])
            latents = None if latents is None else torch.cat([latents[own] for own in kept])
        elif not sum(counts):
            frames, kind = frames[:1].zero_(), "text"
            latents = None if latents is None else latents[:1].zero_()
        branches, rows = self._collator.branches, [sample.row for sample in samples]
        sequences = [row for row in rows for _ in range(branches)]
        keys = [self._catalog.key(row) for row in sequences]
        encoded = [one for sample in samples for one in sample.encoded]
        groups = [self._catalog.group(row) for row in sequences]
        counts = [count // branches for count in counts for _ in range(branches)]
        batch = self._collator.join(frames, counts, encoded, keys, kind, groups, latents)
        if branches == 2:
            batch = self._compared(batch, rows)
        return batch.pin_memory() if self._pinned else batch

    def _compared(self, batch: Batch, rows: list[int]) -> Batch:
        """Pairs with what the model said of them before training, once that is known."""
        known = self._references
        if known is not None and np.isnan(known[rows]).any():
            row = next(row for row in rows if np.isnan(known[row]).any())
            raise DataError(
                f"{self._catalog.where(row)}: it could not be read when references were measured, "
                "and now can; start the run anew in another output_dir"
            )
        return dataclasses.replace(
            batch,
            pair_rows=torch.tensor(rows),
            reference=None if known is None else torch.from_numpy(known[rows]),
            dpo_beta=self._dpo_beta,
        )


def cut(counts: Sequence[int], threads: int) -> Iterator[tuple[int, int]]:
    """Where parts of a micro-batch begin and end: neighbours, with about as many frames each.

    They are as large as may be, but so small that two micro-batches occupy all threads.

    Args:
        counts: Frames of each sample.
    """
    costs = [max(1, count) for count in counts]
    limit = min(MAX_PART, -(-2 * sum(costs) // threads))
    first = cost = 0
    for last, more in enumerate(costs, 1):
        cost += more
        if cost >= limit or last == len(costs):
            yield first, last
            first, cost = last, 0


def open_storage(config: StorageConfig, catalog: Catalog) -> Storage:
    """The storage of a recipe; it has a cache where a shard is remote."""
    patience = Patience(timeout_s=config.timeout_s, give_up_s=config.give_up_s)
    if not any_remote(catalog):
        return Storage(patience)
    return Storage(patience, RangeCache(config.cache_dir, int(config.cache_gb * 1e9)))


def any_remote(catalog: Catalog) -> bool:
    return any(remote.is_remote(shard.location) for shard in catalog.shards)


def _ahead_bytes(config: StorageConfig) -> int:
    """What is asked for ahead must not be thrown out of the cache before its turn."""
    return int(min(config.read_ahead_mb * 1e6, config.cache_gb * 1e9 / 16))
