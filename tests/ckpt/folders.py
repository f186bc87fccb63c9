"""Folders that look like checkpoints, and what may happen to them; no engine is needed."""

import json
from pathlib import Path

from vlm.ckpt.files import describe, write_json
from vlm.ckpt.keep import COMPLETE, folder_name
from vlm.ckpt.save import MANIFEST


def make_checkpoint(folder: Path, step: int) -> Path:
    path = folder / folder_name(step)
    (path / "model").mkdir(parents=True)
    (path / "state_00000.safetensors").write_bytes(bytes(range(256)) * 40)
    (path / "model/config.json").write_text("{}")
    seal(path)
    return path


def seal(path: Path) -> None:
    """Makes the manifest fit the files as they are now."""
    for name in (COMPLETE, MANIFEST):
        (path / name).unlink(missing_ok=True)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    write_json(path / MANIFEST, {p.relative_to(path).as_posix(): describe(p) for p in files})
    (path / COMPLETE).touch()


def unfinished(path: Path) -> None:
    path.rename(path.with_suffix(".tmp"))


def flip(path: Path) -> None:
    """One bit, in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def change(path: Path, **values: object) -> None:
    """Other values for some keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())
