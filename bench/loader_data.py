"""Data for bench/loader.py: tars of clips, and the same clips as each rival wants them."""

import itertools
import json
import struct
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from webdataset import TarWriter

from vlm.data.manifest import manifest
from vlm.data.text.tokenizer import train_tokenizer

SIZE, MAX_FRAMES, QUALITY = 224, 32, 90
IMAGE_TOKEN = "<|image|>"
#: different pictures; decoding one twice is not cheaper than decoding two
NUM_PICTURES = 256
WORDS = "a red circle moves slowly from the left to the right edge of a dark green field".split()


class Data(NamedTuple):
    """A folder of the same samples in every form."""

    folder: Path

    @property
    def tars(self) -> list[Path]:
        return sorted(self.folder.glob("tars/*.tar"))

    @property
    def manifest(self) -> Path:
        return self.folder / "m.parquet"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    def samples(self) -> Iterator[tuple[bytes, list[bytes]]]:
        """(JSON, JPEGs) of each sample in the order of the tars."""
        return itertools.chain.from_iterable(map(read_tar, self.tars))


def read_tar(path: Path) -> Iterator[tuple[bytes, list[bytes]]]:
    with tarfile.open(path) as archive:
        for _, group in itertools.groupby(archive, lambda m: m.name.partition(".")[0]):
            bodies = {m.name: archive.extractfile(m).read() for m in group}  # type: ignore[union-attr]
            words = next(body for name, body in bodies.items() if name.endswith("json"))
            yield words, [bodies[name] for name in sorted(bodies) if name.endswith("jpg")]


def ready(folder: Path, num_shards: int = 8, samples_per_shard: int = 128) -> Data:
    """The data of a folder, made if it is not there."""
    data = Data(folder)
    return data if data.tars else make(folder, num_shards, samples_per_shard)


def make(folder: Path, num_shards: int, samples_per_shard: int) -> Data:
    """Clips of 1 to 32 frames: noise whose spectrum falls as that of photographs does."""
    data, rng = Data(folder), np.random.default_rng(0)
    jpegs = [_picture(rng) for _ in range(NUM_PICTURES)]
    (folder / "tars").mkdir(parents=True)
    texts = []
    for shard in range(num_shards):
        with (folder / f"tars/clips-{shard:05d}.tar").open("wb") as file:
            writer = TarWriter(file, mtime=0, encoder=False)
            for i in range(samples_per_shard):
                count = int(rng.integers(1, MAX_FRAMES + 1))
                key, text = f"{shard * samples_per_shard + i:08d}", " ".join(rng.choice(WORDS, 24))
                texts.append(text)
                writer.write({"__key__": key, "json": _words(text, count)})
                chosen = rng.integers(NUM_PICTURES, size=count)
                frames = {f"{k:03d}.jpg": jpegs[picture] for k, picture in enumerate(chosen)}
                writer.write({"__key__": key, **frames})
            writer.close()
    train_tokenizer(texts, data.tokenizer, vocab_size=400, image_token=IMAGE_TOKEN)
    manifest.build(data.tars, str(data.tokenizer), IMAGE_TOKEN, data.manifest)
    return data


def _picture(rng: np.random.Generator) -> bytes:
    spectrum = np.fft.rfft2(rng.standard_normal((3, SIZE, SIZE)))
    down, across = np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE)[None]
    plane = np.fft.irfft2(spectrum / np.maximum(np.hypot(down, across), 1 / SIZE))
    plane = 128 + 48 * plane / plane.std()
    pixels = np.ascontiguousarray(plane.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
    return simplejpeg.encode_jpeg(pixels, quality=QUALITY, colorsubsampling="420")


def _words(text: str, num_frames: int) -> bytes:
    sample = {
        "version": 1,
        "kind": "video",
        "source": "bench",
        "frame_count": num_frames,
        "turns": [
            {"role": "user", "content": "What happens?"},
            {"role": "assistant", "content": text},
        ],
    }
    return json.dumps(sample).encode()


def decode(jpegs: Sequence[bytes | memoryview]) -> torch.Tensor:
    """(T, 224, 224, 3) uint8, by the fastest decoder there is for all."""
    frames = torch.empty((len(jpegs), SIZE, SIZE, 3), dtype=torch.uint8)
    for jpeg, out in zip(jpegs, frames.numpy(), strict=True):
        simplejpeg.decode_jpeg(jpeg, colorspace="RGB", strict=True, buffer=out)
    return frames


def pack(jpegs: list[bytes]) -> bytes:
    """One value for formats that have no lists of any length."""
    return struct.pack(f"<I{len(jpegs)}I", len(jpegs), *map(len, jpegs)) + b"".join(jpegs)


def unpack(packed: bytes) -> list[memoryview]:
    (count,) = struct.unpack_from("<I", packed)
    sizes = struct.unpack_from(f"<{count}I", packed, 4)
    ends = list(itertools.accumulate(sizes, initial=4 + 4 * count))
    return [memoryview(packed)[first:last] for first, last in itertools.pairwise(ends)]
