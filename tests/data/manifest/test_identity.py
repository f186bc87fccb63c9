import tarfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from tests.data import helpers
from tests.data.conftest import IMAGE_TOKEN
from vlm.data.format.digests import digest
from vlm.data.manifest import identity, manifest
from vlm.data.manifest.manifest import Manifest
from vlm.errors import DataError


def build(folder: Path, tokenizer: Path, counts: list[int]) -> Manifest:
    paths = helpers.write_shards(folder, counts, per_shard=3)
    manifest.build(paths, str(tokenizer), IMAGE_TOKEN, folder / "m.parquet")
    return manifest.load(folder / "m.parquet")


def frames_of(path: Path) -> dict[str, list[bytes]]:
    """JPEG bytes by key, with plain `tarfile`."""
    found: dict[str, list[bytes]] = defaultdict(list)
    with tarfile.open(path) as archive:
        for info in sorted(archive, key=lambda info: info.name):
            file = archive.extractfile(info)
            assert file is not None
            found[info.name.partition(".")[0]] += [file.read()] * info.name.endswith("jpg")
    return found


def test_samples_are_known_by_their_frames(tmp_path: Path, tokenizer_path: Path) -> None:
    first = build(tmp_path / "a", tokenizer_path, [2, 1, 3, 1, 0, 4, 0])
    second = build(tmp_path / "b", tokenizer_path, [1])
    rows, others = identity.identities([first, second])
    assert (rows.shape, others.shape) == ((7, 2), (1, 2))
    expected = {}
    for path in sorted((tmp_path / "a").glob("*.tar")):
        for key, frames in frames_of(path).items():
            expected[key] = digest(*frames) if frames else None
    for row, key in zip(rows, first.keys(range(7)), strict=True):
        assert expected[key] in (None, row.tobytes())
    assert len({row.tobytes() for row in rows}) == 7


def test_words_do_not_change_it_unless_there_is_nothing_else() -> None:
    frames = {"a.json": b"{}", "a.000.jpg": b"one", "a.001.jpg": b"two"}
    for count, bodies in ((2, frames), (0, {"a.json": b"{}"})):
        one, other = helpers.make_sample(0, count), helpers.make_sample(1, count)
        same = identity.identity(one, bodies) == identity.identity(other, bodies)
        assert same == bool(count)
    again = helpers.make_sample(0, 0).model_copy(update={"meta": {"id": 9}, "source": "other"})
    assert identity.identity(again, {}) == identity.identity(helpers.make_sample(0, 0), {})


def test_contained_is_what_a_set_says() -> None:
    rng = np.random.default_rng(0)
    rows, among = (rng.integers(0, 6, (n, 2), dtype=np.uint64) for n in (200, 12))
    known = {tuple(row) for row in among.tolist()}
    expected = [tuple(row) in known for row in rows.tolist()]
    assert identity.contained(rows, among).tolist() == expected
    assert 0 < sum(expected) < 200
    assert not identity.contained(rows, np.empty((0, 2), np.uint64)).any()


def test_a_shard_that_changed_is_a_mistake(tmp_path: Path, tokenizer_path: Path) -> None:
    found = build(tmp_path, tokenizer_path, [1, 1])
    (shard,) = tmp_path.glob("*.tar")
    raw = bytearray(shard.read_bytes())
    raw[:512] = bytes(512)
    shard.write_bytes(raw)
    with pytest.raises(DataError, match="video-00000.tar at byte 0"):
        identity.identities([found])
    shard.unlink()
    with pytest.raises(DataError, match="is missing"):
        identity.identities([found])
