"""The catalog: the manifests of a mixture side by side, their rows numbered through.

Row 0 is the first sample of the first source; source k's rows follow those of source k-1, and so do
its shards. A manifest that two sources name is loaded once and counted twice. Not here: how much of
which source is trained on (``vlm.data.plan.mixture``), reading samples (``vlm.data.load.reader``).
"""

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlm.data.manifest import manifest
from vlm.data.manifest.manifest import Manifest, ShardInfo
from vlm.data.plan.policy import KINDS
from vlm.data.storage import remote
from vlm.errors import DataError


@dataclass(frozen=True)
class Source:
    """One entry of a mixture, as far as reading its samples goes."""

    name: str
    manifest: Manifest
    #: frames that each image is shown as
    image_frames: int = 1


@dataclass(frozen=True)
class Catalog:
    """Sources side by side; entry i of each array is row i, all (num_samples,)."""

    sources: tuple[Source, ...]
    #: (K+1,) first row of each source, and the number of rows
    first_rows: np.ndarray
    #: frames as stored, before images are shown as several
    num_frames: np.ndarray
    #: text tokens without placeholders
    num_tokens: np.ndarray
    num_answer_tokens: np.ndarray
    #: positions in ``vlm.data.plan.policy.KINDS``
    kind: np.ndarray
    #: positions in ``shards``, ascending
    shard: np.ndarray
    height: np.ndarray
    width: np.ndarray

    @property
    def num_samples(self) -> int:
        return int(self.first_rows[-1])

    @functools.cached_property
    def shards(self) -> list[ShardInfo]:
        return [shard for source in self.sources for shard in source.manifest.shards]

    def source_index(self, row: int) -> int:
        """Which of ``sources`` a row is from."""
        assert 0 <= row < self._firsts[-1], row
        return bisect.bisect_right(self._firsts, row) - 1

    @functools.cached_property
    def _firsts(self) -> list[int]:
        """``first_rows`` for one row at a time, where numpy takes ten times as long."""
        return self.first_rows.tolist()

    def group(self, row: int) -> int:
        """Position of a row's source and kind in ``groups``."""
        return self.source_index(row) * len(KINDS) + int(self.kind[row])

    @property
    def groups(self) -> list[tuple[str, str]]:
        """Every (source, kind) that losses are told apart by."""
        return [(source.name, kind) for source in self.sources for kind in KINDS]

    def source(self, row: int) -> Source:
        return self.sources[self.source_index(row)]

    def locate(self, row: int) -> tuple[Manifest, int]:
        """The manifest that describes a row, and its number there."""
        index = self.source_index(row)
        return self.sources[index].manifest, int(row) - self._firsts[index]

    def key(self, row: int) -> str:
        found, own = self.locate(row)
        return found.key(own)

    def keys(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        own = np.asarray(rows)
        index = np.searchsorted(self.first_rows, own, "right") - 1
        found = np.empty(len(own), object)
        for k in np.unique(index):
            mine = index == k
            found[mine] = self.sources[k].manifest.keys(own[mine] - self.first_rows[k])
        return found.tolist()

    def where(self, row: int) -> str:
        """Shard, byte and key of a sample, for errors."""
        found, own = self.locate(row)
        return found.where(own)

    def shards_of(self, rows: np.ndarray) -> list[str]:
        """Where the samples of these rows lie, each shard once, as it may be shown."""
        return [remote.display(self.shards[i].location) for i in np.unique(self.shard[rows])]

    def names(self) -> str:
        """The manifests, for errors."""
        return ", ".join(f"manifest {found.path}" for found in self._manifests())

    def check_shards(self) -> None:
        """Raises DataError when a shard is missing or has another size than it had."""
        for found in self._manifests():
            found.check_shards()

    def check_tokenizer(self, sha256: str, name: str) -> None:
        """Raises DataError where tokens were counted with another tokenizer than ``name``."""
        for found in self._manifests():
            if found.tokenizer_sha256 != sha256:
                raise DataError(
                    f"manifest {found.path}: its tokens were counted with another tokenizer than "
                    f"{name}; build the manifest again with that one"
                )

    def _manifests(self) -> list[Manifest]:
        return list({source.manifest.path: source.manifest for source in self.sources}.values())


def load(entries: Sequence[tuple[str, Path, int]]) -> Catalog:
    """Opens manifests by (name of the source, path, frames of each image).

    Raises:
        DataError: a manifest that is not there or damaged.
    """
    opened = {path: manifest.load(path) for path in dict.fromkeys(path for _, path, _ in entries)}
    return join([Source(name, opened[path], frames) for name, path, frames in entries])


def join(sources: Sequence[Source]) -> Catalog:
    """A catalog of manifests that are open; of one it shares the arrays."""
    assert sources
    counts = [source.manifest.num_samples for source in sources]
    shards, first = [], 0
    for source in sources:
        own = source.manifest.shard
        shards.append(own + np.uint32(first) if first else own)
        first += len(source.manifest.shards)
    columns = ("num_frames", "num_tokens", "num_answer_tokens", "kind", "height", "width")
    return Catalog(
        sources=tuple(sources),
        first_rows=np.cumsum([0, *counts]),
        shard=_concatenate(shards),
        **{
            name: _concatenate([vars(source.manifest)[name] for source in sources])
            for name in columns
        },
    )


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
