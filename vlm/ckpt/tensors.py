"""Tensors in a safetensors file: written as a stream, read in slices. Nothing is ever executed.

The ``safetensors`` package writes only what lies whole in host memory; here a rank's share of a
large model goes to the disk, and through the hash, a piece at a time.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vlm.ckpt.files import CHUNK, DurableFile, FileInfo
from vlm.errors import CheckpointError, one_line

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> FileInfo:
    """Writes tensors of any device through to the disk.

    Raises:
        OSError: the disk is full, the folder cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with DurableFile(path) as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in tensors.values():
            flat = tensor.detach().reshape(-1)
            for part in flat.split(CHUNK // flat.element_size()):
                file.write(part.cpu().contiguous().view(torch.uint8).numpy().data)
    return file.info


class TensorFile:
    """A safetensors file open for reading; tensors are mapped, not loaded.

    Raises:
        CheckpointError: it is no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            self.metadata: dict[str, str] = self._file.metadata() or {}
            self.sizes = {name: self._numel(name) for name in self._file.keys()}
        except (OSError, SafetensorError) as error:
            raise self._fault(error) from None

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """(stop - start,) elements of a flat tensor."""
        try:
            return self._file.get_slice(name)[start:stop]
        except (OSError, SafetensorError) as error:
            raise self._fault(error) from None

    def _fault(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"checkpoint file {self.path}: {one_line(error)}; expected safetensors; restore it or "
            "remove its checkpoint"
        )

    def _numel(self, name: str) -> int:
        shape = self._file.get_slice(name).get_shape()
        if len(shape) != 1:
            raise SafetensorError(f"{name} has the shape {shape}, expected a flat tensor")
        return shape[0]
