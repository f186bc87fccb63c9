"""From the plan's steps to micro-batches in memory, ahead of the training step.

1. Each rank plans every global step and keeps the micro-batches that are its own.
2. Threads of this process read and decode samples; decoders release the interpreter lock.
3. One thread tokenizes, augments and builds batches, a few micro-batches ahead.

What comes out depends on the plan and the position alone, not on threads or ranks.
"""

import functools
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from vlm.batch import Batch, build_batch
from vlm.config import AugmentConfig, DataConfig
from vlm.data import chat, plan
from vlm.data.augment import augment
from vlm.data.catalog import Catalog
from vlm.data.encode import encode_sample
from vlm.data.plan import MicroBatch, Plan, Position
from vlm.data.reader import LoadedSample, Reader
from vlm.errors import DataError, SampleError

#: conversations whose tokens are kept; a small data set is tokenized once, a large one as it comes
TOKEN_CACHE = 65_536


class LoadedStep(NamedTuple):
    """One rank's share of a global step."""

    #: where the next step lies
    next: Position
    epoch: int
    batches: list[Batch]
    #: the whole step, of all ranks
    plan: plan.Step


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Turns read samples into a batch."""

    tokenizer: PreTrainedTokenizerFast
    image_token: str
    tokens_per_frame: int
    loss_on: Literal["answers", "all"]
    augment: AugmentConfig
    seed: int

    @functools.cached_property
    def image_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.image_token)

    def encode(self, loaded: LoadedSample) -> chat.Encoded:
        encoded = encode_sample(self.tokenizer, loaded.sample, self.image_token, self.loss_on)
        return chat.expand_frames(
            encoded, len(loaded.frames), self.tokens_per_frame, self.image_token_id
        )

    def frames(self, loaded: LoadedSample, epoch: int) -> np.ndarray:
        if not len(loaded.frames):
            return loaded.frames
        rng = plan.sample_rng(self.seed, epoch, loaded.row)
        return augment(loaded.frames, self.augment, rng)

    def batch(
        self,
        frames: list[np.ndarray],
        encoded: list[chat.Encoded],
        keys: list[str],
        kind: str,
        blank: tuple[int, int],
    ) -> Batch:
        """Joins samples; ``blank`` is the (H, W) of the frame that text-only batches carry."""
        owned = [f for f in frames if len(f)] or [np.zeros((1, *blank, 3), np.uint8)]
        pixels = torch.from_numpy(np.concatenate(owned)).permute(0, 3, 1, 2)
        return build_batch(
            frames=pixels,
            frame_counts=[len(f) for f in frames],
            input_ids=[e.input_ids for e in encoded],
            labels=[e.labels for e in encoded],
            image_token_id=self.image_token_id,
            tokens_per_frame=self.tokens_per_frame,
            keys=keys,
            kind=kind,
        )


def frame_size(catalog: Catalog) -> tuple[int, int]:
    """(H, W) of the catalog's frames; 224 x 224 where it has none.

    Raises:
        DataError: they are not all of one size.
    """
    has_frames = catalog.num_frames > 0
    if not has_frames.any():
        return (224, 224)
    low, high = (
        (int(pick(catalog.height[has_frames])), int(pick(catalog.width[has_frames])))
        for pick in (np.min, np.max)
    )
    if low != high:
        raise DataError(
            f"{catalog.names()}: frames from {low[0]} x {low[1]} to {high[0]} x {high[1]} "
            "pixels, expected one size; run precompute with one --size for all of its shards"
        )
    return high


class Loader:
    """Iterates over this rank's micro-batches, one global step at a time, without end."""

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
    ) -> None:
        self._catalog, self._plan, self._collator = catalog, plan, collator
        self._config, self._rank, self._world_size = config, rank, world_size
        self._position = position or Position()
        self._reader = Reader(catalog)
        self._tokens: dict[int, chat.Encoded] = {}
        # every rank must call the tower alike, so a blank frame is as large as the others
        self._blank = frame_size(catalog)

    def __iter__(self) -> Iterator[LoadedStep]:
        """Prepares ``prefetch`` micro-batches ahead; an error comes out at its own step."""
        ahead = max(1, self._config.prefetch * self._world_size // self._config.micro_batches)
        ready: queue.Queue[LoadedStep | BaseException] = queue.Queue(ahead)
        stop = threading.Event()
        worker = threading.Thread(target=self._produce, args=(ready, stop), daemon=True)
        worker.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            worker.join()
            self._reader.close()

    def _produce(self, ready: queue.Queue, stop: threading.Event) -> None:
        def put(item: object) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.2)
                except queue.Full:
                    continue

        with ThreadPoolExecutor(self._config.decode_threads, "decode") as pool:
            try:
                for planned in self._plan.steps(self._position):
                    if stop.is_set():
                        return
                    put(self._load(planned, pool))
            except BaseException as error:
                put(error)

    def _load(self, planned: plan.Planned, pool: ThreadPoolExecutor) -> LoadedStep:
        step = planned.step
        mine = plan.assign([batch.cost for batch in step], self._world_size)[self._rank]
        batches = [self._load_batch(step[index], pool) for index in mine]
        return LoadedStep(planned.next, planned.epoch, batches, step)

    def _load_batch(self, micro: MicroBatch, pool: ThreadPoolExecutor) -> Batch:
        rows = micro.rows.tolist()
        loaded = list(pool.map(self._reader.read, rows))
        epochs = micro.epochs.tolist()
        frames = [self._collator.frames(*one) for one in zip(loaded, epochs, strict=True)]
        encoded = [self._encode(one) for one in loaded]
        keys = self._catalog.keys(rows)
        return self._collator.batch(frames, encoded, keys, micro.kind, self._blank)

    def _encode(self, loaded: LoadedSample) -> chat.Encoded:
        if loaded.row not in self._tokens:
            if len(self._tokens) >= TOKEN_CACHE:
                self._tokens.clear()
            try:
                self._tokens[loaded.row] = self._collator.encode(loaded)
            except SampleError as error:
                raise SampleError(f"{self._catalog.where(loaded.row)}: {error}") from None
        return self._tokens[loaded.row]
