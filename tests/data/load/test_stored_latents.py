"""Latents that lie beside frames come with the batch, of the same frames."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from transformers import PreTrainedTokenizerFast

from tests.data import helpers
from tests.data.collators import make_collator
from tests.data.conftest import IMAGE_TOKEN
from tests.data.load.test_loader import make_loader, take
from vlm.batch import Batch
from vlm.data.format.shards import ShardWriter
from vlm.data.load.collate import Collator
from vlm.data.load.reader import Reader
from vlm.data.manifest import manifest
from vlm.data.plan import catalog
from vlm.errors import SampleError

COUNTS = [0, 1, 3, 2, 5, 1, 0, 4] * 6
SHAPE = (2, 3, 3)


def latents_of(index: int) -> np.ndarray:
    """(T, 2, 3, 3) float16, of one sample like no other's."""
    rng = np.random.default_rng(index)
    return rng.standard_normal((COUNTS[index], *SHAPE)).astype(np.float16)


def write(folder: Path, tokenizer_path: Path, without: int | None = None) -> catalog.Catalog:
    with ShardWriter(folder / "shards", "video", 20) as writer:
        for index, count in enumerate(COUNTS):
            body = safetensors.numpy.save({"latents": latents_of(index)})
            body = None if not count or index == without else body
            sample = helpers.make_sample(index, count)
            writer.write(index, sample, helpers.make_frames(index, count), body)
    paths = sorted((folder / "shards").glob("*.tar"))
    manifest.build(paths, str(tokenizer_path), IMAGE_TOKEN, folder / "m.parquet")
    return catalog.load([("train", folder / "m.parquet", 1)])


@pytest.fixture
def collator(tokenizer: PreTrainedTokenizerFast) -> Collator:
    return make_collator(tokenizer, seed=7, latent_shape=SHAPE)


def expected(batch: Batch) -> torch.Tensor:
    owned = [latents_of(int(key)) for key in batch.keys if COUNTS[int(key)]]
    return torch.from_numpy(np.concatenate(owned)) if owned else torch.zeros(1, *SHAPE).half()


def test_a_batch_brings_the_latents_of_its_frames(
    tmp_path: Path, tokenizer_path: Path, collator: Collator
) -> None:
    data = write(tmp_path, tokenizer_path)
    batches = [b for step in take(make_loader(data, collator), 6) for b in step.batches]
    assert {batch.kind for batch in batches} >= {"text", "video"}
    for batch in batches:
        assert batch.latents is not None and len(batch.latents) == len(batch.frames)
        assert torch.equal(batch.latents, expected(batch))
    plain = dataclasses.replace(collator, latent_shape=None)
    assert all(b.latents is None for s in take(make_loader(data, plain), 1) for b in s.batches)


def test_latents_that_are_not_there_or_of_another_size_are_faults(
    tmp_path: Path, tokenizer_path: Path
) -> None:
    data = write(tmp_path, tokenizer_path, without=3)
    reader = Reader(data)
    for row, shape, said in (
        (2, (2, 4, 4), r"found latents of \(2, 3, 3\), expected \(2, 4, 4\)"),
        (3, SHAPE, "no latents beside its frames"),
    ):
        frames = np.empty_like(reader.read(row).frames)
        with pytest.raises(SampleError, match=said):
            reader.read_into(row, frames, np.empty((len(frames), *shape), np.float16))
    reader.close()
