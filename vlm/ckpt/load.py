"""Resuming: find the newest whole checkpoint, agree on it, load it on all ranks.

Nothing in a checkpoint is executed: tensors are safetensors, all else is JSON. A run may go on on
another number of ranks, and in another ZeRO stage; its samples stay the same.
"""

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from vlm import dist
from vlm.ckpt.agree import together
from vlm.ckpt.engine_state import Counters, load_pieces, set_counters, state_file
from vlm.ckpt.files import TEMPORARY, describe
from vlm.ckpt.keep import COMPLETE
from vlm.ckpt.save import MANIFEST, TRAINER, rank_file
from vlm.ckpt.state import TrainState, seed_rank, set_rng_state
from vlm.engine.ds_keys import walk
from vlm.errors import CheckpointError, one_line

log = logging.getLogger(__name__)

#: bytes that a JSON file of a checkpoint may have
MAX_JSON = 64 * 2**20


def _all_of(kind: type) -> BeforeValidator:
    """Every field and no other: a default would hide what another version did not save."""
    names = sorted(field.name for field in dataclasses.fields(kind))

    def check(found: Any) -> Any:
        if not isinstance(found, dict) or sorted(found) != names:
            raise ValueError(f"expected the keys {', '.join(names)}")
        return found

    return BeforeValidator(check)


class _Trainer(BaseModel):
    """``trainer.json``; what else stands there is for people."""

    state: Annotated[TrainState, _all_of(TrainState)]
    identity: dict[str, Any]
    engine: Annotated[Counters, _all_of(Counters)]
    world_size: int = Field(gt=0)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole, as all ranks see it; says which it skipped and why.

    All ranks call it together: each hashes its share of the files, and any of them can object.

    Raises:
        CheckpointError: there are finished ones, and every one is damaged.
    """
    finished = []
    names = sorted((path.name for path in folder.glob("step_*")), reverse=True)
    for name in dist.gather_objects(names)[0]:
        path = folder / name
        faults = dist.gather_objects(_find_fault(path))
        found = next((f"{f} (rank {rank})" for rank, f in enumerate(faults) if f), None)
        seen = dist.gather_objects(_seen(path))
        if found is None and len(set(seen)) > 1:
            found = f"ranks see different files there; expected one folder for all, {seen}"
        if found is None:
            return path
        if dist.is_main():
            log.warning("skipping checkpoint %s: %s", path, found)
        if any(seen):
            finished.append(f"{name}: {found}")
    if finished:
        raise CheckpointError(
            f"checkpoints {folder}: none is whole ({'; '.join(finished[:3])}); bring one back, or "
            "remove the folder to start anew"
        )
    return None


def _seen(path: Path) -> str | None:
    """What tells a finished checkpoint from another: None where this rank sees none."""
    if not _is_finished(path):
        return None
    try:
        return hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()[:16]
    except OSError as error:
        return f"{MANIFEST}: {error.strerror}"


def _find_fault(path: Path) -> str | None:
    """What is wrong with this rank's share of a checkpoint, or None."""
    if not _is_finished(path):
        return "it was never finished"
    try:
        files = _read_json(path / MANIFEST)
        for name in sorted(files)[dist.rank() :: dist.world_size()]:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                return f"{MANIFEST} names {name!r}, expected files of the checkpoint"
            expected, size = files[name], (path / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes, expected {expected['bytes']}"
            if describe(path / name)["sha256"] != expected["sha256"]:
                return f"{name} has changed since it was saved"
    except (CheckpointError, OSError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} does not fit: {one_line(error)}"
    return None


def _is_finished(path: Path) -> bool:
    return path.suffix != TEMPORARY and (path / COMPLETE).is_file()


def _read_json(path: Path) -> Any:
    """Raises CheckpointError where it is too large or not JSON."""
    try:
        if (size := path.stat().st_size) > MAX_JSON:
            raise ValueError(f"found {size:,} bytes, expected at most {MAX_JSON:,}")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"checkpoint file {path} cannot be read: {one_line(error)}; expected JSON; remove its "
            "checkpoint to go on from the one before"
        ) from None


def resume(engine: Any, folder: Path, identity: dict[str, Any], seed: int) -> TrainState | None:
    """Loads the newest whole checkpoint of a run into ``engine`` on all ranks.

    Args:
        seed: of the random states of ranks, where another number of them saved.

    Returns:
        The state to go on from; None if there is no checkpoint yet.

    Raises:
        CheckpointError: on all ranks: all are damaged, or it belongs to another run.
    """
    path = newest(folder)
    if path is None:
        return None
    trainer = together(lambda: _read_trainer(path, identity))[dist.rank()]
    state, num_saved = trainer.state, trainer.world_size
    load_pieces(engine, [path / state_file(rank) for rank in range(num_saved)])
    set_counters(engine, trainer.engine)
    # last, so that nothing that loading drew stays drawn
    if num_saved == dist.world_size():
        together(lambda: set_rng_state(_read_json(path / rank_file(dist.rank()))))
    else:
        seed_rank(seed, state.step, dist.rank())
        log.info("saved by %d ranks, resumed by %d", num_saved, dist.world_size())
    log.info("resumed from %s", path)
    return state


def _read_trainer(path: Path, identity: dict[str, Any]) -> _Trainer:
    try:
        trainer = _Trainer.model_validate(_read_json(path / TRAINER))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"checkpoint {path}: {TRAINER} does not fit: {where}: {first['msg']}; expected what "
            "this version writes; remove it to go on from the one before"
        ) from None
    check_identity(path, trainer.identity, identity)
    files = (state_file(rank) for rank in range(trainer.world_size))
    if missing := next((name for name in files if not (path / name).is_file()), None):
        raise CheckpointError(
            f"checkpoint {path}: {missing} is missing; expected one of each of the "
            f"{trainer.world_size} ranks that saved; remove it to go on from the one before"
        )
    return trainer


def check_identity(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Refuses to go on with other data, another model or another optimizer.

    Raises:
        CheckpointError: with the dotted keys that differ.
    """
    # through JSON, as what was found has been: a tuple is a list there
    now, then = _leaves(json.loads(json.dumps(expected))), _leaves(found)
    differ = [key for key in {**now, **then} if now.get(key) != then.get(key)]
    if differ:
        shown = [f"{key} was {then.get(key)!r} and is now {now.get(key)!r}" for key in differ[:5]]
        more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise CheckpointError(
            f"checkpoint {path} is of another run: {', '.join(shown)}{more}; go on with the recipe "
            "it was saved with, or choose another output_dir"
        )


def _leaves(tree: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in walk(tree) if not isinstance(value, dict)}
