import hashlib
import json
from pathlib import Path

import pytest

from vlm.ckpt import files


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_described_by_what_was_written(tmp_path: Path) -> None:
    with files.DurableFile(tmp_path / "a") as file:
        file.write(b"one ")
        file.write(memoryview(b"two"))
    expected = {"bytes": 7, "sha256": hashlib.sha256(b"one two").hexdigest()}
    assert file.info == expected == files.describe(tmp_path / "a")
    assert files.copy(tmp_path / "a", tmp_path / "below/b") == expected
    assert (tmp_path / "below/b").read_bytes() == b"one two"
    assert files.write_json(tmp_path / "c", {"x": [1]}) == files.describe(tmp_path / "c")
    assert json.loads((tmp_path / "c").read_text()) == {"x": [1]}


def test_a_text_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.yaml"
    files.replace_text(path, "old")
    files.replace_text(path, "new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["recipe.yaml"]

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        files.replace_text(path, "newer")
    assert path.read_text() == "new"


def test_the_marker_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed on the way, half a checkpoint does not look like a whole one."""
    path = tmp_path / "step_1"
    path.mkdir()
    (path / "COMPLETE").touch()
    (path / "state").touch()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            files.remove(path, "COMPLETE")
    assert names(path) == ["state"]
    files.remove(path, "COMPLETE")
    assert not path.exists()
