"""Samples in their places: read, tokenized, decoded and augmented, some of a micro-batch at a time.

A sample that is bad is replaced by the plan's first substitute that is good. Not here: which thread
loads which of them, and joining them (``vlm.data.load.loader``).
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlm.data.format.schema import Sample
from vlm.data.load.collate import Collator
from vlm.data.load.faults import BadSamples, Fault
from vlm.data.load.reader import Opened, Reader
from vlm.data.plan.catalog import Catalog
from vlm.data.plan.plan import Plan
from vlm.data.storage.ahead import Fetches
from vlm.data.text import chat
from vlm.errors import DataError, SampleError

#: conversations whose tokens are kept; a small data set is tokenized once, a large one as it comes
TOKEN_CACHE = 65_536
#: substitutes in a row that may be bad as well
MAX_SUBSTITUTES = 64


class Wanted(NamedTuple):
    """A sample of the plan, and its place."""

    row: int
    #: how often it was shown before
    epoch: int
    #: (T, H, W, 3) uint8 of all its sequences
    out: np.ndarray
    #: (T, C, h, w) float16 of the frames; None where none are wanted
    latents: np.ndarray | None = None


class Loaded(NamedTuple):
    """A sample that lies in its place."""

    row: int
    #: of all its sequences
    num_frames: int
    #: one, or both branches of a pair
    encoded: list[chat.Encoded]
    faults: list[Fault]


class Samples:
    """Loads samples of a plan; safe to share between threads."""

    def __init__(self, catalog: Catalog, plan: Plan, collator: Collator, reader: Reader) -> None:
        self._catalog, self._plan = catalog, plan
        self._collator, self._reader = collator, reader
        self._tokens: dict[tuple[int, bool], list[chat.Encoded]] = {}

    def load(self, part: Sequence[Wanted], fetches: Fetches, bad: BadSamples) -> list[Loaded]:
        """Some samples: all of them are read, then parsed, then tokenized, then decoded.

        In this order a step finds in the processor's caches what it left there with the sample
        before; decoding leaves nothing.

        Args:
            fetches: Ranges that are on their way.
            bad: Rows that are not read again.

        Raises:
            DataError: a sample is bad, and so are all that may stand in for it.
            TransientError: a shard cannot be reached.
        """
        good = [i for i, wanted in enumerate(part) if wanted.row not in bad]
        for i in good:
            self._wait(part[i].row, fetches)
        opened = dict(zip(good, self._reader.open([part[i].row for i in good]), strict=True))
        encoded = {i: one and self._encode_good(part[i], one) for i, one in opened.items()}
        decoded = {
            i: self._decode_good(part[i], one, text)
            for i, one in opened.items()
            if one and (text := encoded[i])
        }
        # last, because it reads again: what was opened is gone then
        return [
            decoded.get(i) or self._load_one(wanted, fetches, bad) for i, wanted in enumerate(part)
        ]

    def _wait(self, row: int, fetches: Fetches) -> None:
        if fetches and (found := self._reader.remote_range(row)) in fetches:
            fetches[found].result()

    def _encode_good(self, wanted: Wanted, opened: Opened) -> list[chat.Encoded] | None:
        try:
            return self._encode(wanted, opened.content.sample)
        except SampleError:
            return None

    def _decode_good(
        self, wanted: Wanted, opened: Opened, encoded: list[chat.Encoded]
    ) -> Loaded | None:
        try:
            self._reader.decode(opened, self._own(wanted.out), wanted.latents)
        except SampleError:
            return None
        self._finish(wanted)
        return Loaded(wanted.row, len(wanted.out), encoded, [])

    def _load_one(self, wanted: Wanted, fetches: Fetches, bad: BadSamples) -> Loaded:
        """The sample of a row, or the first good one of those that may stand in for it."""
        row, epoch, out, latents = wanted
        faults: list[Fault] = []
        for candidate in itertools.chain([row], self._plan.substitutes(row, epoch)):
            if candidate in bad:
                faults.append(Fault(candidate, "found bad before"))
                continue
            self._wait(candidate, fetches)
            frames = out[: int(self._plan.rows.num_frames[candidate])]
            own = None if latents is None else latents[: len(frames)]
            stand_in = Wanted(candidate, epoch, frames, own)
            try:
                sample = self._reader.read_into(candidate, self._own(frames), own)
                self._finish(stand_in)
                encoded = self._encode(stand_in, sample)
            except SampleError as error:
                faults.append(Fault(candidate, str(error)))
                if len(faults) - 1 >= MAX_SUBSTITUTES:
                    break
                continue
            return Loaded(candidate, len(frames), encoded, faults)
        raise DataError(
            f"{self._catalog.where(row)}: it is bad, and none of {len(faults) - 1} substitutes "
            f"is good; the last: {faults[-1].message}; run validate_shards"
        )

    def _own(self, out: np.ndarray) -> np.ndarray:
        """The frames of the first of a sample's sequences."""
        return out[: len(out) // self._collator.branches]

    def _finish(self, wanted: Wanted) -> None:
        """Augments the frames of the first sequence; the others show the same."""
        row, epoch, out, _ = wanted
        own = self._own(out)
        self._collator.augment_frames(own, row, epoch)
        if len(out) > len(own):
            out.reshape(-1, *own.shape)[1:] = own

    def _encode(self, wanted: Wanted, sample: Sample) -> list[chat.Encoded]:
        row, epoch, out, _ = wanted
        name = row, self._plan.question_first(row, epoch)
        kept = self._tokens.get(name)  # once: another thread may clear them in between
        if kept is not None:
            return kept
        stored = int(self._catalog.num_frames[row])
        repeats = len(self._own(out)) // stored if stored else 1
        try:
            encoded = self._collator.encode_branches(sample, stored, repeats, name[1])
        except SampleError as error:
            raise SampleError(f"{self._catalog.where(row)}: {error}") from None
        if len(self._tokens) >= TOKEN_CACHE:
            self._tokens.clear()
        self._tokens[name] = encoded
        return encoded
