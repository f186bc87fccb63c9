"""Saving: a checkpoint is complete or it does not exist.

1. All ranks write into ``step_N.tmp``: DeepSpeed's state and their random states.
2. Rank 0 adds the model for ``transformers``, ``trainer.json`` and, over all files, sizes and
   hashes in ``manifest.json``, then ``COMPLETE``.
3. It is renamed to ``step_N``, ``latest`` is pointed at it, and only then old ones are removed.

DeepSpeed's own ``latest`` is not used: it is written before the other ranks are done.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch

from vlm import dist
from vlm.ckpt.state import TrainState, rng_state
from vlm.models.registry import quiet_transformers

log = logging.getLogger(__name__)

#: bytes and sha256 of a file
FileInfo = dict[str, int | str]

COMPLETE = "COMPLETE"
LATEST = "latest"
MANIFEST = "manifest.json"
TRAINER = "trainer.json"
MODEL = "model"
#: suffix of what is still being written
TEMPORARY = ".tmp"
#: DeepSpeed puts these beside every checkpoint; they unpickle, and ``model/`` makes them needless
RECOVERY_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")


def save(
    engine: Any,
    tokenizer: Any,
    folder: Path,
    state: TrainState,
    identity: dict[str, Any],
    keep_last: int,
) -> Path:
    """Writes ``folder/step_N`` on all ranks and prunes older ones.

    Args:
        folder: the run's ``checkpoints``.
        identity: what a resumed run must share: plan_id, world size, recipe, versions.
    """
    name = f"step_{state.step:08d}"
    temporary, final = folder / f"{name}{TEMPORARY}", folder / name
    if dist.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
    dist.barrier()
    engine.save_checkpoint(str(folder), tag=temporary.name, save_latest=False)
    torch.save(rng_state(), temporary / rank_file(dist.rank()))
    export_model(engine, tokenizer, temporary / MODEL)
    if dist.is_main():
        trainer = {"state": dataclasses.asdict(state), "identity": identity}
        write_json(temporary / TRAINER, trainer)
    dist.barrier()
    files = _describe_together(temporary)
    if dist.is_main():
        write_json(temporary / MANIFEST, files)
        (temporary / COMPLETE).touch()
        sync_tree(temporary)
        if final.exists():  # a resumed run comes by here again
            shutil.rmtree(final)
        os.replace(temporary, final)
        replace_text(folder / LATEST, name)
        prune(folder, name, keep_last)
        for script in RECOVERY_SCRIPTS:
            (folder / script).unlink(missing_ok=True)
        log.info("checkpoint %s", final)
    dist.barrier()
    return final


def export_model(engine: Any, tokenizer: Any, folder: Path) -> None:
    """Config, safetensors and tokenizer that ``transformers`` loads without DeepSpeed."""
    model = engine.module
    if engine.zero_optimization_stage() == 3:
        weights = engine._zero3_consolidated_16bit_state_dict()  # collective
    else:
        weights = model.state_dict()
    if dist.is_main():
        with quiet_transformers():
            model.save_pretrained(folder, state_dict=weights)
            tokenizer.save_pretrained(folder)


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.pt"


def _describe_together(folder: Path) -> dict[str, FileInfo]:
    """Every rank hashes its share of the files: for one alone 100 GB take minutes."""
    names = cast(list[str], dist.broadcast_object(list_files(folder) if dist.is_main() else None))
    parts = dist.gather_objects(describe_files(folder, names[dist.rank() :: dist.world_size()]))
    return {name: info for part in parts for name, info in part.items()}


def list_files(folder: Path) -> list[str]:
    """Every file below ``folder``, relative to it."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, FileInfo]:
    paths = {name: folder / name for name in names}
    return {n: {"bytes": p.stat().st_size, "sha256": sha256(p)} for n, p in paths.items()}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def replace_text(path: Path, text: str) -> None:
    """A reader sees the old text or the new one, whatever happens meanwhile."""
    temporary = path.with_name(path.name + TEMPORARY)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync(path.parent)


def sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune(folder: Path, newest: str, keep_last: int) -> None:
    """Removes all but ``keep_last`` finished checkpoints up to ``newest``, and what kills left.

    One after ``newest`` is of an abandoned future: it was damaged when the run resumed before it.
    """
    finished = sorted(p.parent for p in folder.glob(f"step_*/{COMPLETE}"))
    kept = [p for p in finished if p.suffix != TEMPORARY and p.name <= newest][-keep_last:]
    for old in set(folder.glob("step_*")) - set(kept):
        # the marker goes first: half a checkpoint must not look like a whole one
        (old / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(old)
