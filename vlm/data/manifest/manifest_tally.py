"""What adds up while the shards of a manifest come in: its header, and a summary to show.

Not here: rows, which are written as they come (`vlm.data.manifest.manifest_file`).
"""

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from vlm.data.manifest import parts
from vlm.data.manifest.manifest_file import (
    PLANNING_COLUMNS,
    VERSION,
    Header,
    Shard,
    Source,
    Tokenizer,
    Vision,
)
from vlm.data.manifest.rows import Options, ShardRows
from vlm.data.storage import remote
from vlm.errors import DataError


@dataclass(frozen=True)
class Summary:
    """What a build found."""

    num_shards: int
    #: shards that had to be read; the others were known
    num_read: int
    num_samples: int
    num_frames: int
    num_tokens: int
    num_answer_tokens: int
    fingerprint: str
    #: one message for every sample that was left out
    rejected: list[str]
    #: number of samples by the form of their words
    forms: dict[str, int]
    sources: list[Source]


@dataclass
class Tally:
    """What adds up while the shards of a manifest come in."""

    output: Path
    options: Options
    tokenizer_sha256: str
    #: URL of the folder that the shards will be read from; None: where they are
    location: str | None = None
    num_read: int = 0
    shards: list[Shard] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)
    forms: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    licences: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    totals: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._digest = hashlib.sha256(
            json.dumps([VERSION, self.tokenizer_sha256, self.vision.model_dump()]).encode()
        )

    @property
    def vision(self) -> Vision:
        return Vision(size=self.options.size, **self.options.sampling._asdict())

    def tasks(self, paths: Sequence[str]) -> list[parts.Task]:
        folder = parts.folder_of(self.output)
        folder.mkdir(parents=True, exist_ok=True)
        kept = [VERSION, asdict(self.options), self.tokenizer_sha256]
        options_hash = hashlib.sha256(json.dumps(kept).encode()).hexdigest()
        return [
            parts.Task(
                path, folder / parts.part_name(self._relative(path)), self.options, options_hash
            )
            for path in paths
        ]

    def add(self, path: str, rows: ShardRows, is_new: bool) -> None:
        batch = rows.batch
        self.num_read += is_new
        self.shards.append(
            Shard(
                path=self._location(path),
                bytes=rows.num_bytes,
                sha256=rows.sha256,
                num_samples=len(batch),
            )
        )
        self._digest.update(json.dumps([rows.num_bytes, rows.sha256, len(batch)]).encode())
        for column in PLANNING_COLUMNS:
            if column != "shard":
                self._digest.update(batch[column].to_numpy().tobytes())
        for column in ("num_frames", "num_tokens", "num_answer_tokens"):
            self.totals[column] += int(batch[column].to_numpy().sum(dtype=np.int64))
        for counted in batch["source"].value_counts().to_pylist():
            self.sources[counted["values"]] += counted["counts"]
        for source, licences in rows.licences.items():
            self.licences[source].update(licences)
        self.forms.update(rows.forms)
        self.rejected += rows.rejected

    def check_rejected(self, max_rejected_frac: float) -> None:
        num_found = sum(shard.num_samples for shard in self.shards) + len(self.rejected)
        if len(self.rejected) > max_rejected_frac * num_found:
            raise DataError(
                f"{len(self.rejected)} of {num_found} samples cannot be used, at most "
                f"{max_rejected_frac:.0%} may be left out; the first: {self.rejected[0]}; see "
                "validate_shards for all"
            )

    def header(self) -> Header:
        return Header(
            version=VERSION,
            tokenizer=Tokenizer(name=self.options.tokenizer_path, sha256=self.tokenizer_sha256),
            vision=self.vision,
            shards=self.shards,
            sources=[
                Source(name=name, num_samples=count, licences=sorted(self.licences[name]))
                for name, count in sorted(self.sources.items())
            ],
            forms=dict(sorted(self.forms.items())),
            fingerprint=self._digest.hexdigest(),
        )

    def summary(self) -> Summary:
        header = self.header()
        return Summary(
            num_shards=len(self.shards),
            num_read=self.num_read,
            num_samples=sum(shard.num_samples for shard in self.shards),
            num_frames=self.totals["num_frames"],
            num_tokens=self.totals["num_tokens"],
            num_answer_tokens=self.totals["num_answer_tokens"],
            fingerprint=header.fingerprint,
            rejected=self.rejected,
            forms=header.forms,
            sources=header.sources,
        )

    def _location(self, path: str) -> str:
        return f"{self.location}/{Path(path).name}" if self.location else self._relative(path)

    def _relative(self, path: str) -> str:
        if remote.is_remote(path):
            return path
        return os.path.relpath(os.path.abspath(path), os.path.abspath(self.output.parent))
