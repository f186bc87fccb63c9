"""What a validation finds: faults, and statistics that add up over shards.

Not here: finding them (`vlm.data.validation.check`, `compare`), showing them (`page`, the tool).
"""

from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from vlm.data.format.digests import as_rows, digest
from vlm.data.format.schema import Sample

#: last frame count of each row of the statistics; what is above goes to one more
FRAME_BUCKETS = (0, 4, 8, 16, 32, 64)
#: a shard that names a source for each of its samples is no reason to keep them all
MAX_SOURCES = 1000
OTHER_SOURCES = "(other sources)"
#: sizes that are shown; natural images come in thousands
MAX_SIZES = 20
#: a shard made of faults is no reason to keep them all; what is above is counted
MAX_SHARD_FAULTS = 100_000


class Fault(NamedTuple):
    """Key and member are empty where a fault is the whole shard's."""

    shard: str
    key: str
    member: str
    #: what was checked, out of `CHECKS`
    check: str
    fault: str


#: kinds of faults, in the order in which they are shown -> what they mean
CHECKS = {
    "tar": "damage, truncation, headers that no shard needs",
    "member": "names and types that are not allowed, members that are double or not adjacent",
    "schema": "JSON that is missing, too large or not the schema, frames that do not fit it",
    "frames": "frames of several sizes in a sample",
    "decode": "images or videos that do not decode",
    "text": "text that cannot be encoded, is too long, or teaches nothing",
    "size": "frames of another size than most have",
    "key": "keys that two shards of a folder share",
    "content": "the same frames and text as another sample",
    "leak": "frames or text that are also in the evaluation set",
    "manifest": "shards that are not what the manifest says",
}


#: kinds that some data sets have by nature
ALLOWABLE = ("content", "size", "text")


class Text(NamedTuple):
    """Tokens of a sample's text, without placeholders."""

    num_tokens: int
    num_answer_tokens: int


@dataclass
class Tally:
    """Statistics of some samples."""

    num_samples: int = 0
    num_frames: int = 0
    num_bytes: int = 0
    num_tokens: int = 0
    num_answer_tokens: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    forms: Counter[str] = field(default_factory=Counter)
    #: samples by their number of frames
    frames: Counter[int] = field(default_factory=Counter)
    #: samples by the bit length of their number of tokens, and of bytes
    tokens: Counter[int] = field(default_factory=Counter)
    bytes: Counter[int] = field(default_factory=Counter)
    #: samples by (height, width) of their frames
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)

    def add(
        self,
        sample: Sample,
        num_frames: int,
        size: tuple[int, int],
        num_bytes: int,
        text: Text | None,
    ) -> None:
        self.num_samples += 1
        self.num_frames += num_frames
        self.num_bytes += num_bytes
        self.kinds[sample.kind] += 1
        self.forms[sample.form] += 1
        self.frames[num_frames] += 1
        self.bytes[num_bytes.bit_length()] += 1
        if size != (0, 0):
            self.sizes[size] += 1
        if text is not None:
            self.num_tokens += text.num_tokens
            self.num_answer_tokens += text.num_answer_tokens
            self.tokens[text.num_tokens.bit_length()] += 1

    def update(self, other: "Tally") -> None:
        self.num_samples += other.num_samples
        self.num_frames += other.num_frames
        self.num_bytes += other.num_bytes
        self.num_tokens += other.num_tokens
        self.num_answer_tokens += other.num_answer_tokens
        self.kinds += other.kinds
        self.forms += other.forms
        self.frames += other.frames
        self.tokens += other.tokens
        self.bytes += other.bytes
        self.sizes += other.sizes

    @property
    def supervised_frac(self) -> float | None:
        """Share of text tokens that answers learn; None where they were not counted."""
        return self.num_answer_tokens / self.num_tokens if self.num_tokens else None

    def as_json(self) -> dict[str, Any]:
        """Counts and histograms, by the names people read."""
        sizes = {f"{h}x{w}": count for (h, w), count in self.sizes.most_common(MAX_SIZES)}
        if (others := self.sizes.total() - sum(sizes.values())) > 0:
            sizes["other"] = others
        return {
            "num_samples": self.num_samples,
            "num_frames": self.num_frames,
            "num_bytes": self.num_bytes,
            "num_tokens": self.num_tokens,
            "num_answer_tokens": self.num_answer_tokens,
            "supervised_frac": self.supervised_frac,
            "kinds": dict(sorted(self.kinds.items())),
            "forms": dict(sorted(self.forms.items())),
            "frames": _frame_buckets(self.frames),
            "tokens": _doubling_buckets(self.tokens),
            "bytes": _doubling_buckets(self.bytes),
            "sizes": sizes,
        }


def add_source(sources: dict[str, Tally], name: str) -> Tally:
    """The statistics of a source; sources beyond the bound share one."""
    if name not in sources and len(sources) >= MAX_SOURCES:
        name = OTHER_SOURCES
    return sources.setdefault(name, Tally())


@dataclass
class ShardReport:
    """What one shard holds; arrays have an entry for each sample, faulty ones among them."""

    path: Path
    #: kinds of faults that are counted and are none
    allowed: frozenset[str] = frozenset()
    num_allowed: Counter[str] = field(default_factory=Counter)
    num_bytes: int = 0
    #: empty unless a manifest asks for it
    sha256: str = ""
    sources: dict[str, Tally] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    num_dropped_faults: int = 0
    #: keys of samples with a fault; more than `faults` names where too many were dropped
    faulty: set[str] = field(default_factory=set)
    num_decoded: int = 0
    #: keys one after the other in UTF-8, and where each ends
    key_bytes: bytearray = field(default_factory=bytearray)
    key_ends: "array[int]" = field(default_factory=lambda: array("Q"))
    #: height and width of each sample's frames; 0 without, or where they differ
    sizes: "array[int]" = field(default_factory=lambda: array("I"))
    #: of folder and key; of frames and text; of frames, or text without frames
    key_digests: bytearray = field(default_factory=bytearray)
    content_digests: bytearray = field(default_factory=bytearray)
    identity_digests: bytearray = field(default_factory=bytearray)

    @property
    def num_samples(self) -> int:
        return len(self.key_ends)

    def key(self, row: int) -> str:
        start = self.key_ends[row - 1] if row else 0
        return self.key_bytes[start : self.key_ends[row]].decode()

    def add(self, key: str, size: tuple[int, int], content: bytes, identity: bytes) -> None:
        """One more sample, by what tells it from others."""
        self.key_bytes += key.encode()
        self.key_ends.append(len(self.key_bytes))
        self.sizes.extend(size)
        self.key_digests += digest(bytes(self.path.parent), key.encode())
        self.content_digests += content
        self.identity_digests += identity

    def fault(self, check: str, key: str, member: str, text: str) -> None:
        assert check in CHECKS, check
        if check in self.allowed:
            self.num_allowed[check] += 1
            return
        if key:
            self.faulty.add(key)
        if len(self.faults) < MAX_SHARD_FAULTS:
            self.faults.append(Fault(str(self.path), key, member, check, text))
        else:
            self.num_dropped_faults += 1


def digest_rows(reports: list[ShardReport], name: str) -> np.ndarray:
    """(N, 2) uint64, the digests of all samples of all shards: "key", "content" or "identity"."""
    columns = {
        "key": [report.key_digests for report in reports],
        "content": [report.content_digests for report in reports],
        "identity": [report.identity_digests for report in reports],
    }
    return as_rows(b"".join(columns[name]))


@dataclass(frozen=True)
class Report:
    #: what is shown as a histogram -> its key in the JSON of a tally
    HISTOGRAMS: ClassVar[dict[str, str]] = {
        "frames": "frames",
        "text tokens": "tokens",
        "bytes": "bytes",
        "frame size": "sizes",
        "kind": "kinds",
        "form": "forms",
    }

    num_shards: int
    #: of the files, headers and padding included
    num_bytes: int
    num_samples: int
    num_decoded: int
    #: samples that are named by a fault
    num_faulty: int
    total: Tally
    sources: dict[str, Tally]
    faults: list[Fault]
    #: what would be faults, by kind, if it were not allowed
    num_allowed: Counter[str]
    #: (shard, key) of the samples to leave out, by shard
    faulty: dict[Path, set[str]]

    @property
    def faults_by_check(self) -> dict[str, int]:
        found = Counter(fault.check for fault in self.faults)
        return {check: found[check] for check in CHECKS if found[check]}

    def as_json(self) -> dict[str, Any]:
        return {
            "clean": not self.faults,
            "num_shards": self.num_shards,
            "num_bytes": self.num_bytes,
            "num_samples": self.num_samples,
            "num_decoded": self.num_decoded,
            "num_faulty": self.num_faulty,
            "faults_by_check": self.faults_by_check,
            "num_allowed": dict(sorted(self.num_allowed.items())),
            "total": self.total.as_json(),
            "sources": {name: tally.as_json() for name, tally in sorted(self.sources.items())},
            "faults": [fault._asdict() for fault in self.faults],
        }


def _frame_buckets(frames: Counter[int]) -> dict[str, int]:
    buckets = {}
    low = 0
    for high in FRAME_BUCKETS:
        name = f"{low}-{high}" if low < high else str(high)
        buckets[name] = sum(n for count, n in frames.items() if low <= count <= high)
        low = high + 1
    if more := sum(n for count, n in frames.items() if count >= low):
        buckets[f"{low} and more"] = more
    return buckets


def _doubling_buckets(lengths: Counter[int]) -> dict[str, int]:
    """Samples by amount, in steps that double; from the first that is not empty to the last."""
    if not lengths:
        return {}
    return {_between(bits): lengths[bits] for bits in range(min(lengths), max(lengths) + 1)}


def _between(bits: int) -> str:
    low, high = (1 << bits) >> 1, (1 << bits) - 1
    return f"{low:,}-{high:,}" if low < high else str(low)
