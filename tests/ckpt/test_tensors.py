import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlm.ckpt import tensors
from vlm.errors import CheckpointError


def test_the_safetensors_package_reads_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "CHUNK", 64)  # several pieces of each
    kinds = [kind for kind in tensors.DTYPES if kind.is_floating_point]
    written = {str(kind): torch.randn(37, 3).to(kind) for kind in kinds}
    written |= {"ints": torch.arange(99), "flags": torch.rand(9) > 0.5, "none": torch.empty(0)}
    written["strided"] = torch.randn(20, 30).t()
    info = tensors.write(tmp_path / "x", written, {"steps": "{}"})
    content = (tmp_path / "x").read_bytes()
    assert info == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    found = load_file(tmp_path / "x")
    assert found.keys() == written.keys()
    for name, tensor in written.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_ranges_of_flat_tensors_are_read(tmp_path: Path) -> None:
    flat = torch.arange(100, dtype=torch.float32)
    tensors.write(tmp_path / "x", {"a/b": flat}, {"steps": "7"})
    file = tensors.TensorFile(tmp_path / "x")
    assert file.sizes == {"a/b": 100}
    assert file.metadata == {"steps": "7"}
    assert torch.equal(file.read("a/b", 10, 20), flat[10:20])


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"\xff" * 64, bytes(8) + b"{}"])
def test_what_is_no_safetensors_file_is_one_clear_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match="expected safetensors"):
        tensors.TensorFile(tmp_path / "x")


def test_tensors_must_be_flat(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "x")
    with pytest.raises(CheckpointError, match="expected a flat tensor"):
        tensors.TensorFile(tmp_path / "x")
