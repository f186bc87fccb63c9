"""Resuming: find the newest complete checkpoint, agree on it, load it on all ranks.

Nothing in a checkpoint is executed: ``vlm.engine.cpu.safe_loading`` must have run.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch

from vlm import dist
from vlm.ckpt.save import COMPLETE, MANIFEST, TRAINER, rank_file, sha256
from vlm.ckpt.state import TrainState, set_rng_state
from vlm.errors import CheckpointError

log = logging.getLogger(__name__)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all there and unchanged; says which it skipped."""
    for path in sorted(folder.glob("step_????????"), reverse=True):
        fault = find_fault(path)
        if fault is None:
            return path
        log.warning("skipping checkpoint %s: %s", path, fault)
    return None


def find_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    if not (path / COMPLETE).is_file():
        return f"no {COMPLETE} marker, so it was never finished"
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in files.items():
            found = (path / name).stat().st_size
            if found != expected["bytes"]:
                return f"{name} has {found} bytes, expected {expected['bytes']}"
            if sha256(path / name) != expected["sha256"]:
                return f"{name} has changed since it was saved"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} does not fit: {error}"
    return None


def resume(engine: Any, folder: Path, identity: dict[str, Any]) -> TrainState | None:
    """Loads the newest complete checkpoint of a run into ``engine`` on all ranks.

    Returns:
        The state to go on from; None if there is no checkpoint yet.

    Raises:
        CheckpointError: it belongs to another run, or a rank does not see it.
    """
    path = dist.broadcast_object(newest(folder) if dist.is_main() else None)
    if path is None:
        return None
    assert isinstance(path, Path)
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


def check_identity(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Refuses to go on with other data, another model or another number of ranks."""
    for key, value in expected.items():
        if found.get(key) != value:
            raise CheckpointError(
                f"checkpoint {path}: {key} is {found.get(key)!r}, this run has {value!r}; go on "
                "with the same recipe and ranks, or choose another output_dir"
            )
