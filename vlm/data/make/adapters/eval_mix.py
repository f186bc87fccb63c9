"""The frozen evaluation mix: samples drawn out of held-out shards, none of which was trained on.

1. Every sample of the candidates and of the training shards gets an identity
   (`vlm.data.manifest.identity`): a hash of its frames, or of its words if it has none.
2. Candidates that are in the training shards, or in the mix already, are left out and counted; of
   the others the seed draws as many as each source owes.
3. They are copied as bytes, shuffled, under new keys. What was written is read again and checked
   against the training shards once more; only then the folder gets its name.

    OUTPUT/eval-00000.tar ...
    OUTPUT/eval.json             what was drawn, left out and checked

The mix never changes again: a second run only checks it, against training shards that may be new.
Not here: making candidates out of data sets (`tools/precompute.py` with ``--split val``).
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from vlm.data.format import shards
from vlm.data.format.rewrite import ShardCopy
from vlm.data.make.spool import write_text
from vlm.data.manifest import manifest
from vlm.data.manifest.identity import contained, identities, shard_identities
from vlm.data.manifest.manifest import Manifest
from vlm.errors import ConfigError, DataError

#: samples of each source in the whole mix
COUNTS = {
    "cauldron": 3000,
    "openvid": 2000,
    "llava-youtube": 2000,
    "smoltalk": 2000,
    "webvid": 1000,
}
NUM_SAMPLES = sum(COUNTS.values())
RECORD_FILE = "eval.json"
VERSION: Final = 1


@dataclass(frozen=True)
class Part:
    """One source of the mix."""

    name: str
    num_samples: int
    #: that were also in the training shards
    num_leaks: int
    #: whose frames or words were in the mix already
    num_doubles: int


@dataclass(frozen=True)
class Report:
    parts: list[Part]
    #: False if the mix was there and has only been checked
    is_new: bool
    #: samples of the training shards that it was checked against
    num_trained: int


Progress = Callable[[int, int], None]


def publish(
    candidates: Mapping[str, Sequence[Path]],
    training: Sequence[Path],
    output: Path,
    *,
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
    samples_per_shard: int = 1000,
    workers: int = 1,
    progress: Progress | None = None,
) -> Report:
    """Draws the mix, or checks the one that is there.

    Args:
        candidates: Manifests of held-out shards, by the names of ``COUNTS``.
        training: Manifests of everything that is trained on.
        num_samples: Of a smaller mix of the same proportions.
        progress: Called with (shards read, shards in all).

    Raises:
        ConfigError: a source is missing, or none of the mix, or there is no training manifest.
        DataError: too few candidates are left, or a mix that is there holds what is trained on.
    """
    counts = shares(num_samples)
    if {name for name, paths in candidates.items() if paths} != set(counts):
        raise ConfigError(
            f"candidates for {', '.join(sorted(candidates)) or 'nothing'}: expected manifests for "
            f"each of {', '.join(counts)}"
        )
    if not training:
        raise ConfigError("no manifest of training shards; expected those of everything trained on")
    trained_on = [manifest.load(path) for path in training]
    if output.exists():
        trained = np.concatenate(identities(trained_on, workers, progress))
        return _check(output, {"seed": seed, "num_samples": num_samples}, trained)
    sources = {name: [manifest.load(path) for path in candidates[name]] for name in counts}
    everything = [*trained_on, *(found for own in sources.values() for found in own)]
    rows = iter(identities(everything, workers, progress))
    trained = np.concatenate([next(rows) for _ in trained_on])
    drawn: list[_Sample] = []
    parts = []
    taken: set[bytes] = set()
    for number, (name, own) in enumerate(sources.items()):
        ids = np.concatenate([next(rows) for _ in own])
        order = np.random.default_rng((seed, number)).permutation(len(ids))
        part, picked = _draw(name, counts[name], ids[order], contained(ids[order], trained), taken)
        parts.append(part)
        drawn += _locate(own, order[picked])
    order = np.random.default_rng((seed, len(counts))).permutation(len(drawn))
    record = _Record(
        version=VERSION,
        seed=seed,
        num_samples=num_samples,
        num_trained=len(trained),
        parts=parts,
    )
    _write([drawn[i] for i in order], output, samples_per_shard, trained, record)
    return Report(parts, True, len(trained))


def shares(num_samples: int) -> dict[str, int]:
    """Samples of each source in a mix of this size; as in the whole one, to the sample."""
    if not 1 <= num_samples <= NUM_SAMPLES:
        raise ConfigError(f"num_samples {num_samples}: expected 1 to {NUM_SAMPLES}")
    found = {name: count * num_samples // NUM_SAMPLES for name, count in COUNTS.items()}
    # what rounding left over goes to those that lost most
    lost = sorted(COUNTS, key=lambda name: -(COUNTS[name] * num_samples % NUM_SAMPLES))
    for name in lost[: num_samples - sum(found.values())]:
        found[name] += 1
    return {name: count for name, count in found.items() if count}


class _Sample(NamedTuple):
    found: Manifest
    row: int


class _Record(BaseModel):
    """The file beside the shards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Literal[1]
    seed: int
    num_samples: int
    #: samples of the training shards when it was drawn
    num_trained: int
    parts: list[Part]
    #: of the identities in the order of the samples
    sha256: str = ""


def _draw(
    name: str, count: int, ids: np.ndarray, leaks: np.ndarray, taken: set[bytes]
) -> tuple[Part, list[int]]:
    """The first ``count`` rows that may be taken; ``taken`` grows by them."""
    picked: list[int] = []
    num_doubles = 0
    for row, leaked in enumerate(leaks.tolist()):
        if leaked or len(picked) == count:
            continue
        own = ids[row].tobytes()
        if own in taken:
            num_doubles += 1
            continue
        taken.add(own)
        picked.append(row)
    part = Part(name, len(picked), int(leaks.sum()), num_doubles)
    if len(picked) < count:
        raise DataError(
            f"{name}: {len(ids)} candidates, of which {part.num_leaks} are also trained on and "
            f"{num_doubles} are there twice, leave {len(picked)}; expected {count}: hold out more"
        )
    return part, picked


def _locate(own: Sequence[Manifest], rows: np.ndarray) -> list[_Sample]:
    """Rows that are numbered through several manifests."""
    ends = np.cumsum([found.num_samples for found in own])
    index = np.searchsorted(ends, rows, "right")
    return [
        _Sample(own[i], int(row - ends[i]) + own[i].num_samples)
        for i, row in zip(index.tolist(), rows.tolist(), strict=True)
    ]


def _write(
    samples: Sequence[_Sample],
    output: Path,
    samples_per_shard: int,
    trained: np.ndarray,
    record: _Record,
) -> None:
    """Writes the folder aside, checks it and gives it its name."""
    aside = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for number, start in enumerate(range(0, len(samples), samples_per_shard)):
        with ShardCopy(aside / f"eval-{number:05d}.tar") as copy:
            for key in range(start, min(start + samples_per_shard, len(samples))):
                found, row = samples[key]
                path = found.shards[found.shard[row]].path
                place = int(found.offset[row]), int(found.length[row])
                with shards.open_shard(path) as shard:
                    copy.copy_sample(shard.read, *place, f"{key:08d}", found.where(row))
    sha256 = _leak_free(aside, trained)
    record = record.model_copy(update={"sha256": sha256})
    write_text(aside / RECORD_FILE, record.model_dump_json(indent=1) + "\n")
    aside.rename(output)


def _check(output: Path, asked: dict[str, int], trained: np.ndarray) -> Report:
    path = output / RECORD_FILE
    try:
        record = _Record.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise DataError(
            f"{output}: holds no {RECORD_FILE} of ours; take another --output"
        ) from None
    if names := [name for name, value in asked.items() if record.__dict__[name] != value]:
        raise DataError(
            f"{output} holds a mix of another {', '.join(names)}; take another --output"
        )
    if _leak_free(output, trained) != record.sha256:
        raise DataError(f"{output}: its samples have changed since it was drawn; bring them back")
    return Report(record.parts, False, len(trained))


def _leak_free(folder: Path, trained: np.ndarray) -> str:
    """sha256 of the identities in a folder of shards.

    Raises:
        DataError: one of them is trained on.
    """
    digest = hashlib.sha256()
    leaks = []
    for path in shards.find_shards([folder]):
        keys, ids = shard_identities(path)
        digest.update(ids.tobytes())
        leaks += [f"{keys[row]} of {path.name}" for row in np.flatnonzero(contained(ids, trained))]
    if leaks:
        raise DataError(
            f"{folder}: {len(leaks)} of its samples are also trained on: {', '.join(leaks[:3])}; "
            "the mix is frozen, take them out of the training shards"
        )
    return digest.hexdigest()
