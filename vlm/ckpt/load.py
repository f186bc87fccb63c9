"""Resuming: find the newest complete checkpoint, agree on it, load it on all ranks.

Nothing in a checkpoint is executed: ``vlm.engine.cpu.safe_loading`` must have run.
"""

import json
import logging
from pathlib import Path
from typing import Any, cast

import torch

from vlm import dist
from vlm.ckpt.save import COMPLETE, MANIFEST, TEMPORARY, TRAINER, rank_file, sha256
from vlm.ckpt.state import TrainState, set_rng_state
from vlm.engine.ds_keys import walk
from vlm.errors import CheckpointError

log = logging.getLogger(__name__)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all there and unchanged; says which it skipped.

    Raises:
        CheckpointError: there are finished ones, and every one is damaged.
    """
    finished = []
    for path in sorted(folder.glob("step_*"), reverse=True):
        fault = find_fault(path)
        if fault is None:
            return path
        log.warning("skipping checkpoint %s: %s", path, fault)
        if _is_finished(path):
            finished.append(f"{path.name}: {fault}")
    if finished:
        raise CheckpointError(
            f"checkpoints {folder}: none is whole ({'; '.join(finished[:3])}); bring one back, or "
            "remove the folder to start anew"
        )
    return None


def find_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    if not _is_finished(path):
        return "it was never finished"
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in files.items():
            found = (path / name).stat().st_size
            if found != expected["bytes"]:
                return f"{name} has {found} bytes, expected {expected['bytes']}"
            if sha256(path / name) != expected["sha256"]:
                return f"{name} has changed since it was saved"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} does not fit: {error}"
    return None


def _is_finished(path: Path) -> bool:
    return path.suffix != TEMPORARY and (path / COMPLETE).is_file()


def resume(engine: Any, folder: Path, identity: dict[str, Any]) -> TrainState | None:
    """Loads the newest complete checkpoint of a run into ``engine`` on all ranks.

    Returns:
        The state to go on from; None if there is no checkpoint yet.

    Raises:
        CheckpointError: all are damaged, it belongs to another run, or a rank does not see it.
    """
    path = _agree_on_newest(folder)
    if path is None:
        return None
    seen = dist.all_reduce([float((path / COMPLETE).is_file())], engine.device, "min")
    if not seen[0]:
        raise CheckpointError(f"checkpoint {path}: not every rank sees it; expected one folder")
    trainer = json.loads((path / TRAINER).read_text(encoding="utf-8"))
    check_identity(path, trainer["identity"], identity)
    loaded, _ = engine.load_checkpoint(str(folder), tag=path.name)
    assert loaded is not None, path
    # last, so that nothing that loading drew stays drawn
    set_rng_state(torch.load(path / rank_file(dist.rank()), weights_only=True))
    log.info("resumed from %s", path)
    return TrainState(**trainer["state"])


def _agree_on_newest(folder: Path) -> Path | None:
    """Rank 0 looks, all ranks go on with what it found, or fail with it."""
    found: Path | None = None
    error: CheckpointError | None = None
    if dist.is_main():
        try:
            found = newest(folder)
        except CheckpointError as caught:
            error = caught
    found, error = cast(Any, dist.broadcast_object((found, error)))
    if error is not None:
        raise error
    return found


def check_identity(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Refuses to go on with other data, another model, other ranks or another optimizer.

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
            "and ranks it was saved with, or choose another output_dir"
        )


def _leaves(tree: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in walk(tree) if not isinstance(value, dict)}
