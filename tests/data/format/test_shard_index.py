from pathlib import Path

import numpy as np
import pytest

from tests.data import clips, helpers
from vlm.data.format import shard_index, shards
from vlm.errors import DataError

COUNTS = [3, 0, 1, 7, 2]


def test_an_index_says_where_each_sample_lies(tmp_path: Path) -> None:
    paths = helpers.write_shards(tmp_path, COUNTS, per_shard=2)
    index = shard_index.build_index(paths, content=True)
    expected = [(i, s) for i, path in enumerate(paths) for s in shards.scan(path)]
    assert index.shard.tolist() == [i for i, _ in expected]
    assert index.offset.tolist() == [s.offset for _, s in expected]
    assert index.length.tolist() == [s.length for _, s in expected]
    assert index.keys.to_pylist() == [s.key for _, s in expected]
    assert index.num_frames.tolist() == COUNTS
    assert index.sources == {"test": 0} and not index.source.any()


def test_frames_of_a_video_file_are_counted_from_its_headers(tmp_path: Path) -> None:
    clip = clips.write_clip(tmp_path / "c.mp4", num_frames=50, fps=10)
    members = [("a.mp4", clip.read_bytes()), ("a.txt", b"a clip"), ("b.txt", b"nothing")]
    path = helpers.write_tar(tmp_path / "a.tar", members[:2])
    assert shard_index.build_index([path], content=True).num_frames.tolist() == [5]
    bad = helpers.write_tar(tmp_path / "b.tar", members)
    with pytest.raises(DataError, match=r"b\.tar at byte \d+, key b"):
        shard_index.build_index([bad], content=True)
    assert shard_index.build_index([bad], content=False).num_samples == 2


def test_the_fingerprint_follows_keys_and_places(tmp_path: Path) -> None:
    prints = set()
    for name, members in {
        "a": [("a.txt", b"x"), ("b.txt", b"y")],
        "b": [("b.txt", b"x"), ("a.txt", b"y")],
        "c": [("a.txt", b"x" * 513), ("b.txt", b"y")],
    }.items():
        path = helpers.write_tar(tmp_path / f"{name}.tar", members)
        prints.add(shard_index.build_index([path], content=False).fingerprint())
    assert len(prints) == 3
    again = helpers.write_tar(tmp_path / "d.tar", [("a.txt", b"z"), ("b.txt", b"")])
    assert len(prints | {shard_index.build_index([again], content=False).fingerprint()}) == 4


def test_keys_are_checked_among_the_chosen_rows(tmp_path: Path) -> None:
    a, b = (
        helpers.write_tar(tmp_path / n, [("k.txt", b""), (f"{n[0]}.txt", b"")])
        for n in ("x.tar", "y.tar")
    )
    index = shard_index.build_index([a, b], content=False)
    index.check_keys(np.array([0, 1, 3]))
    with pytest.raises(DataError, match=f"1 keys are there twice: k in {a} and {b}"):
        index.check_keys(np.arange(4))
