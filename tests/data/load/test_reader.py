"""What is read is what was written; what is not as the manifest says does not get through."""

import dataclasses
import io
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data import helpers
from tests.data.conftest import IMAGE_TOKEN
from vlm.data.load import reader
from vlm.data.load.reader import Reader
from vlm.data.manifest import manifest
from vlm.data.manifest.manifest import Manifest
from vlm.data.plan import catalog
from vlm.data.storage import storage
from vlm.errors import SampleError

COUNTS = [3, 8, 0, 1, 5, 0, 2, 7]


@pytest.fixture
def built(tmp_path: Path, tokenizer_path: Path) -> Manifest:
    paths = helpers.write_shards(tmp_path / "shards", COUNTS, per_shard=3)
    manifest.build(paths, str(tokenizer_path), IMAGE_TOKEN, tmp_path / "m.parquet")
    return manifest.load(tmp_path / "m.parquet")


def open_reader(built: Manifest) -> Reader:
    return Reader(catalog.join([catalog.Source("train", built)]))


def by_pillow(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def test_what_is_read_is_what_was_written(built: Manifest) -> None:
    members = dict(m for shard in built.shards for m in helpers.tar_members(shard.path))
    read = open_reader(built).read
    for row in random.Random(0).sample(range(len(COUNTS)), len(COUNTS)):
        loaded = read(row)
        assert loaded.row == row
        assert loaded.sample == helpers.make_sample(row, COUNTS[row])
        assert loaded.frames.dtype == np.uint8
        if not COUNTS[row]:
            assert len(loaded.frames) == 0
            continue
        expected = [by_pillow(members[f"{row:08d}.{i:03d}.jpg"]) for i in range(COUNTS[row])]
        assert np.array_equal(loaded.frames, np.stack(expected))
        written = np.stack(helpers.make_frames(row, COUNTS[row]))
        assert abs(loaded.frames.astype(int) - written).mean() < 3


def test_threads_may_share_it(built: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer open files than shards, so that they are closed while others read."""
    monkeypatch.setattr(storage, "MAX_OPEN_SHARDS", 1)
    alone = [open_reader(built).read(row).frames.tobytes() for row in range(len(COUNTS))]
    shared = open_reader(built)
    rows = random.Random(1).choices(range(len(COUNTS)), k=400)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda row: shared.read(row).frames.tobytes(), rows))
    assert found == [alone[row] for row in rows]


def shard_of(built: Manifest, row: int) -> Path:
    return built.shards[built.shard[row]].path


def overwrite(path: Path, at: int, new: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(new)


def member_at(built: Manifest, row: int, name: str) -> tuple[int, bytes]:
    """Where a member's body lies in its shard, and what it is."""
    raw = shard_of(built, row).read_bytes()
    body = dict(helpers.tar_members(shard_of(built, row)))[name]
    at = raw.index(body, int(built.offset[row]))
    return at, body


def refused(built: Manifest, row: int, *said: str) -> str:
    with pytest.raises(SampleError) as caught:
        open_reader(built).read(row)
    text = str(caught.value)
    for part in (str(shard_of(built, row)), f"key {built.key(row)}", *said):
        assert part in text
    return text


def test_a_truncated_shard(built: Manifest) -> None:
    path = shard_of(built, 1)
    os.truncate(path, int(built.offset[1]) + 700)
    refused(built, 1, f"found 700 of {int(built.length[1])} bytes")
    assert len(open_reader(built).read(0).frames) == COUNTS[0], "what lies before it is whole"


def test_every_flipped_bit_of_a_jpeg_is_found(built: Manifest) -> None:
    """Most give another picture that decodes without complaint: only the hash tells."""
    at, body = member_at(built, 1, "00000001.004.jpg")
    path = shard_of(built, 1)
    texts = []
    for step in random.Random(2).sample(range(len(body)), 60):
        overwrite(path, at + step, bytes([body[step] ^ 1 << step % 8]))
        texts.append(refused(built, 1))
        overwrite(path, at + step, body[step : step + 1])
    assert any("member 00000001.004.jpg: a damaged JPEG" in text for text in texts)
    assert any("not what the manifest was built from" in text for text in texts)
    assert len(open_reader(built).read(1).frames) == COUNTS[1]


def test_another_text_of_the_same_length(built: Manifest) -> None:
    at, body = member_at(built, 0, "00000000.json")
    overwrite(shard_of(built, 0), at, body.replace(b"circle", b"square"))
    refused(built, 0, "not what the manifest was built from")


def test_another_number_of_frames_than_the_manifest_says(built: Manifest) -> None:
    wrong = dataclasses.replace(built, num_frames=built.num_frames + 1)
    refused(wrong, 1, "8 frames, but the manifest says 9", "build the manifest again")


def test_frames_of_another_size_than_the_manifest_says(built: Manifest) -> None:
    wrong = dataclasses.replace(built, width=built.width + 8)
    refused(wrong, 1, "member 00000001.000.jpg", "16 x 16 pixels where 16 x 24 are wanted")


def test_one_frame_of_another_size(built: Manifest, tmp_path: Path) -> None:
    """The shard was made anew with the same names, offsets and lengths."""
    at, body = member_at(built, 1, "00000001.002.jpg")
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 24, 3), np.uint8)).save(file, "JPEG")
    other = file.getvalue()
    assert len(other) <= len(body), "the smaller picture fits in"
    overwrite(shard_of(built, 1), at, other + bytes(len(body) - len(other)))
    refused(built, 1, "not what the manifest was built from")


def test_no_jpeg_at_all(built: Manifest) -> None:
    at, body = member_at(built, 3, "00000003.000.jpg")
    overwrite(shard_of(built, 3), at, bytes(len(body)))
    refused(built, 3, "member 00000003.000.jpg", "not a JPEG")


def test_several_that_are_opened_together(built: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bad one among them is left out, and nothing of it gets into the others."""
    at, body = member_at(built, 1, "00000001.004.jpg")
    overwrite(shard_of(built, 1), at, bytes(len(body)))
    at, _ = member_at(built, 4, "00000004.json")
    overwrite(shard_of(built, 4), at, b"?")
    rows = [5, 4, 0, 1, 7, 0]
    for kept in (reader._MAX_KEPT_BYTES, 1000):
        monkeypatch.setattr(reader, "_MAX_KEPT_BYTES", kept)
        shared = open_reader(built)
        opened = shared.open(rows)
        assert [one is not None for one in opened] == [True, False, True, True, True, True]
        for row, one in zip(rows, opened, strict=True):
            out = np.zeros((COUNTS[row], 16, 16, 3), np.uint8)
            if row == 1:
                with pytest.raises(SampleError, match="00000001.004.jpg"):
                    shared.decode(one, out)
            elif one is not None:
                shared.decode(one, out)
                assert one.content.sample == helpers.make_sample(row, COUNTS[row])
                assert np.array_equal(out, open_reader(built).read(row).frames.reshape(out.shape))
