"""The manifest: one Parquet row for every usable sample of a set of shards, built once, offline.

What happens in ``build``, one shard to a task:

1. ``rows.index_shard`` finds each sample, parses it, measures its frames and tokenizes it. A sample
   that cannot be used is left out and reported; too many of them stop the tally.
2. ``parts.make`` keeps the rows of the shard, so that none is read twice without need.
3. Rows are written in the order of the shards, so the file does not depend on the workers.

Not here: the file (`vlm.data.manifest.manifest_file`), which samples are read when
(`vlm.data.plan.plan`).
"""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from vlm.data.format.decode import DEFAULT_SAMPLING, Sampling
from vlm.data.format.foreign import DEFAULT_SOURCE
from vlm.data.format.schema import MAX_FRAMES
from vlm.data.manifest import manifest_file, parts
from vlm.data.manifest.manifest_file import PLANNING_COLUMNS, Source
from vlm.data.manifest.manifest_tally import Summary, Tally
from vlm.data.manifest.rows import Options, describe
from vlm.data.pool import ordered_map
from vlm.data.storage import remote
from vlm.data.text import chat
from vlm.errors import ConfigError, DataError

#: a larger share of unusable samples is not bad luck but a mistake
MAX_REJECTED_FRAC = 0.01
MAX_SIZE = 4096


@dataclass(frozen=True)
class ShardInfo:
    #: an absolute path, or a URL
    location: str
    bytes: int
    sha256: str
    num_samples: int

    @property
    def path(self) -> Path:
        """Where it lies on this machine.

        Raises:
            DataError: it does not.
        """
        if remote.is_remote(self.location):
            shown = remote.display(self.location)
            raise DataError(f"shard {shown}: is remote; this tool reads local shards, copy it here")
        return Path(self.location)


@dataclass(frozen=True)
class Manifest:
    """A loaded manifest; array entry i and row i of the file are sample i."""

    path: Path
    shards: list[ShardInfo]
    #: changes with the samples, their order and the tokenizer, not with where the shards lie
    fingerprint: str
    tokenizer_sha256: str
    #: which frames of a video file are taken
    sampling: Sampling
    sources: list[Source]
    #: number of samples by the form of their words, see `schema.FORMS`
    forms: dict[str, int]
    #: all (num_samples,) uint32
    num_frames: np.ndarray
    num_tokens: np.ndarray
    num_answer_tokens: np.ndarray
    kind: np.ndarray
    shard: np.ndarray
    height: np.ndarray
    width: np.ndarray

    @property
    def num_samples(self) -> int:
        return len(self.kind)

    @functools.cached_property
    def offset(self) -> np.ndarray:
        """(num_samples,) uint64, where a sample starts in its shard."""
        return self._column("offset").to_numpy()

    @functools.cached_property
    def length(self) -> np.ndarray:
        """(num_samples,) uint64, bytes of its headers, members and padding."""
        return self._column("length").to_numpy()

    @functools.cached_property
    def _keys(self) -> pa.Array:
        return self._column("key").combine_chunks()

    def key(self, row: int) -> str:
        return self._keys[int(row)].as_py()

    def keys(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        return self._keys.take(pa.array(rows)).to_pylist()

    def content_hash(self, row: int) -> bytes:
        """16 bytes: XXH3 of the sample's members in their order."""
        return self._content_hashes[row].as_py()

    @functools.cached_property
    def _content_hashes(self) -> pa.Array:
        return self._column("content_hash").combine_chunks()

    def where(self, row: int) -> str:
        """Shard, byte and key of a sample, for errors."""
        shard = remote.display(self.shards[self.shard[row]].location)
        return describe(shard, int(self.offset[row]), self.key(row))

    def check_shards(self) -> None:
        """Raises DataError when a local shard is missing or has another size than it had."""
        faults = []
        for shard in self.shards:
            if remote.is_remote(shard.location):
                continue  # millions of requests; each is checked when it is read
            if not shard.path.is_file():
                faults.append(f"{shard.path} is missing")
            elif (found := shard.path.stat().st_size) != shard.bytes:
                faults.append(f"{shard.path} has {found} bytes, expected {shard.bytes}")
        if faults:
            raise DataError(
                f"manifest {self.path}: {len(faults)} of {len(self.shards)} shards do not fit: "
                f"{'; '.join(faults[:3])}; build the manifest again, or bring them back"
            )

    def _column(self, name: str) -> pa.ChunkedArray:
        return manifest_file.read(self.path, (name,))[1][name]


def build(
    shards: Sequence[Path | str],
    tokenizer_path: str,
    image_token: str,
    output: Path,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
    *,
    size: int | None = None,
    sampling: Sampling = DEFAULT_SAMPLING,
    default_source: str = DEFAULT_SOURCE,
    max_rejected_frac: float = MAX_REJECTED_FRAC,
    location: str | None = None,
) -> Summary:
    """Writes the manifest of ``shards``, in their order, to ``output``.

    Shards that have not changed since the last build of this output, or since one that was killed,
    are not read again; see `vlm.data.manifest.parts`.

    Args:
        shards: Paths, or URLs; of these each is downloaded once, and then deleted.
        progress: Called with (shards done, shards in all).
        size: Side of the square that frames are brought to; None leaves them as they are stored.
        sampling: Which frames of video files are taken.
        default_source: Source of samples that name none.
        max_rejected_frac: Share of samples that may be left out.
        location: URL of the folder that the shards will be read from, if not from where they are.

    Raises:
        DataError: a damaged, empty or foreign shard, or too many unusable samples. No manifest is
            written then.
        ConfigError: the tokenizer cannot be used, or an option is out of range.
    """
    found = [str(shard) for shard in shards]
    if not found:
        raise DataError("no shards to build a manifest of")
    if size is not None and not 1 <= size <= MAX_SIZE:
        raise ConfigError(f"size {size}: expected 1 to {MAX_SIZE} pixels")
    if not 0 < sampling.fps <= 1000 or not 1 <= sampling.max_frames <= MAX_FRAMES:
        raise ConfigError(
            f"fps {sampling.fps} and max_frames {sampling.max_frames}: expected more than 0 and at "
            f"most 1000, and 1 to {MAX_FRAMES}"
        )
    if location is not None:
        location = _check_location(location, found)
    chat.load_tokenizer(tokenizer_path, image_token)
    options = Options(str(tokenizer_path), image_token, size, sampling, default_source)
    tally = Tally(output, options, chat.tokenizer_fingerprint(tokenizer_path), location)
    tasks = tally.tasks(found)
    with manifest_file.open_writer(output) as writer:
        for task, made in zip(tasks, ordered_map(parts.make, tasks, workers), strict=True):
            rows = parts.load(made.part)
            writer.add(len(tally.shards), rows.batch)
            tally.add(task.shard, rows, made.is_new)
            if progress is not None:
                progress(len(tally.shards), len(tasks))
        tally.check_rejected(max_rejected_frac)
        writer.close(tally.header())
    parts.prune(parts.folder_of(output), {task.part for task in tasks})
    return tally.summary()


def _check_location(location: str, shards: Sequence[str]) -> str:
    remote.check_scheme(location)
    names = [Path(shard).name for shard in shards]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"two shards named {twice[0]} cannot both lie at {remote.display(location)}; build a "
            "manifest for each folder"
        )
    return location.rstrip("/")


def load(path: Path) -> Manifest:
    """Reads the planning columns.

    Raises:
        DataError: no such file, not a manifest, or a damaged one.
    """
    header, table = manifest_file.read(path, PLANNING_COLUMNS)
    columns = {name: table[name].to_numpy().astype(np.uint32) for name in PLANNING_COLUMNS}
    folder = os.path.abspath(path.parent)
    infos = [
        ShardInfo(_locate(s.path, folder), s.bytes, s.sha256, s.num_samples) for s in header.shards
    ]
    counts = np.bincount(columns["shard"], minlength=len(infos))
    if counts.tolist() != [info.num_samples for info in infos]:
        raise DataError(f"manifest {path}: its rows do not fit its shard table; build it again")
    return Manifest(
        path=path,
        shards=infos,
        fingerprint=header.fingerprint,
        tokenizer_sha256=header.tokenizer.sha256,
        sampling=Sampling(header.vision.fps, header.vision.max_frames),
        sources=header.sources,
        forms=header.forms,
        **columns,
    )


def _locate(path: str, folder: str) -> str:
    """Where a shard of the table lies; paths are relative to the manifest's folder."""
    return path if remote.is_remote(path) else os.path.normpath(f"{folder}/{path}")
