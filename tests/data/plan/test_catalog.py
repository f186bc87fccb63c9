from pathlib import Path

import numpy as np
import pytest

from tests.data import helpers
from tests.data.conftest import IMAGE_TOKEN
from vlm.data.manifest import manifest
from vlm.data.plan import catalog
from vlm.data.plan.catalog import Catalog
from vlm.errors import DataError

COUNTS = {"a": [3, 0, 1, 2, 5], "b": [1, 1], "c": [0, 4, 2]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Path:
    folder = tmp_path_factory.mktemp("catalog")
    for name, counts in COUNTS.items():
        paths = helpers.write_shards(folder / name, counts, per_shard=2, prefix=name)
        manifest.build(paths, str(tokenizer_path), IMAGE_TOKEN, folder / f"{name}.parquet")
    return folder


def open_all(folder: Path, names: str = "abc") -> Catalog:
    return catalog.load([(name, folder / f"{name}.parquet", 1) for name in names])


def test_rows_are_numbered_through(folder: Path) -> None:
    found = open_all(folder, "abca")
    parts = [manifest.load(folder / f"{name}.parquet") for name in "abca"]
    row = 0
    for index, part in enumerate(parts):
        for own in range(part.num_samples):
            assert found.source_index(row) == index
            assert found.source(row).name == "abca"[index]
            where, local = found.locate(row)
            assert (where.path, local) == (part.path, own)
            assert found.key(row) == part.key(own)
            assert found.where(row) == part.where(own)
            assert found.shards[found.shard[row]] == part.shards[part.shard[own]]
            for name in ("num_frames", "num_tokens", "num_answer_tokens", "kind", "height"):
                assert vars(found)[name][row] == vars(part)[name][own]
            row += 1
    assert row == found.num_samples == 15
    assert len(found.shards) == 3 + 1 + 2 + 3
    assert (np.diff(found.shard.astype(int)) >= 0).all()
    rows = np.random.default_rng(0).permutation(15)
    assert found.keys(rows) == [found.key(int(one)) for one in rows]
    assert found.keys([]) == []


def test_a_manifest_named_twice_is_loaded_once(folder: Path) -> None:
    found = open_all(folder, "aa")
    assert found.sources[0].manifest is found.sources[1].manifest


def test_one_manifest_is_not_copied(folder: Path) -> None:
    found = open_all(folder, "a")
    assert found.num_frames is found.sources[0].manifest.num_frames
    assert found.shard is found.sources[0].manifest.shard


def test_every_manifest_is_checked(folder: Path, tmp_path: Path, tokenizer_path: Path) -> None:
    paths = helpers.write_shards(tmp_path / "d", [1, 2], prefix="d")
    manifest.build(paths, str(tokenizer_path), IMAGE_TOKEN, tmp_path / "d.parquet")
    found = catalog.load([("a", folder / "a.parquet", 1), ("d", tmp_path / "d.parquet", 1)])
    found.check_shards()
    sha256 = found.sources[1].manifest.tokenizer_sha256
    found.check_tokenizer(sha256, "tokenizer")
    with pytest.raises(DataError, match=r"a\.parquet: .* another tokenizer than other"):
        found.check_tokenizer("0" * 64, "other")
    paths[0].unlink()
    with pytest.raises(DataError, match="missing"):
        found.check_shards()
