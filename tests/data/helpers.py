"""Shards written on the fly: good ones by our writer, bad ones by `tarfile`."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlm.data.format.schema import Sample, Turn
from vlm.data.format.shards import ShardWriter

ANSWERS = ("red", "The circle is green.", "blue", "a green square")


def make_sample(index: int, num_frames: int) -> Sample:
    return Sample(
        version=1,
        kind="video" if num_frames else "text",
        source="test",
        frame_count=num_frames,
        turns=(
            Turn(role="user", content="What colour is the circle?"),
            Turn(role="assistant", content=ANSWERS[index % len(ANSWERS)], task="colour"),
        ),
        meta={"id": f"clip-{index}"},
    )


def make_frames(index: int, num_frames: int, size: int = 16) -> list[np.ndarray]:
    rng = np.random.default_rng(index)
    coarse = rng.integers(0, 256, (num_frames, 2, 2, 3), dtype=np.uint8)
    return list(coarse.repeat(size // 2, axis=1).repeat(size // 2, axis=2))


def write_shards(
    folder: Path, frame_counts: Sequence[int], per_shard: int = 100, prefix: str = "video"
) -> list[Path]:
    """Sample i has ``frame_counts[i]`` frames; 0 makes it a text sample."""
    with ShardWriter(folder, prefix, per_shard) as writer:
        for i, count in enumerate(frame_counts):
            writer.write(i, make_sample(i, count), make_frames(i, count))
    return sorted(folder.glob(f"{prefix}-*.tar"))


def write_tar(
    path: Path, members: Sequence[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT
) -> Path:
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return path


def tar_members(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        return [(info.name, _body(archive, info)) for info in archive]


def _body(archive: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(info)
    assert file is not None
    return file.read()
