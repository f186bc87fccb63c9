"""Shards at URLs: found, opened, and made into a manifest that equals that of the local ones."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.data import helpers
from tests.data.conftest import IMAGE_TOKEN
from tests.data.servers import Server, object_store, serve
from tools import build_manifest
from vlm.data.format import shards
from vlm.data.manifest import manifest
from vlm.data.manifest.manifest import Manifest
from vlm.data.storage import locations
from vlm.data.storage.storage import Patience, Storage
from vlm.errors import ConfigError, DataError, TransientError

COUNTS = [2, 0, 3, 1]
BRIEF = Patience(timeout_s=0.3, give_up_s=0.2, first_wait_s=0.02, longest_wait_s=0.1)


@pytest.fixture
def local(tmp_path: Path) -> list[Path]:
    return helpers.write_shards(tmp_path / "s", COUNTS, per_shard=2)


@pytest.fixture
def server(local: list[Path]) -> Iterator[Server]:
    with serve(Server(local[0].parent)) as found:
        yield found


def same(one: Manifest, other: Manifest) -> bool:
    names = [field.name for field in dataclasses.fields(one)]
    columns = [name for name in names if isinstance(vars(one)[name], np.ndarray)]
    assert len(columns) == 7
    return one.fingerprint == other.fingerprint and all(
        np.array_equal(vars(one)[name], vars(other)[name]) for name in columns
    )


def test_a_manifest_of_urls(
    local: list[Path], server: Server, tmp_path: Path, tokenizer_path: Path
) -> None:
    manifest.build(local, str(tokenizer_path), IMAGE_TOKEN, tmp_path / "local.parquet")
    output, urls = tmp_path / "far/m.parquet", [server.url(path) for path in local]
    arguments = [*urls, "--tokenizer", str(tokenizer_path), "--output", str(output)]
    for _ in range(2):  # without a version from the server, the bytes decide
        assert build_manifest.main([*arguments, "--workers", "1"]) == 0
    found = manifest.load(output)
    assert same(manifest.load(tmp_path / "local.parquet"), found)
    assert [shard.location for shard in found.shards] == urls
    found.check_shards()
    assert {asked[0] for asked in server.asked} == {f"/{path.name}" for path in local}


def test_a_manifest_of_a_bucket_is_built_incrementally(
    local: list[Path],
    tmp_path: Path,
    tokenizer_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with object_store(monkeypatch) as bucket:
        import s3fs  # an optional dependency: object_store skips without it

        for path in local:
            s3fs.S3FileSystem().put(str(path), f"{bucket}/x/{path.name}")
        urls = locations.find_shards([f"{bucket}/x", f"{bucket}/x/{local[0].name}"])
        assert urls == [f"{bucket}/x/{path.name}" for path in local]
        args = (str(tokenizer_path), IMAGE_TOKEN, tmp_path / "m.parquet")
        assert manifest.build(urls, *args).num_read == 2
        monkeypatch.setattr(Storage, "whole", None)
        assert manifest.build(urls, *args).num_read == 0, "known by their ETags, not downloaded"
        monkeypatch.undo()
    manifest.build(local, str(tokenizer_path), IMAGE_TOKEN, tmp_path / "local.parquet")
    assert same(manifest.load(tmp_path / "m.parquet"), manifest.load(tmp_path / "local.parquet"))


def test_paths_and_urls_together(local: list[Path], server: Server) -> None:
    urls = [server.url(local[1])]
    found = locations.find_shards([*urls, str(local[0].parent), *urls])
    assert found == [*map(str, local), *urls]
    for location in (str(local[1]), *urls):
        with locations.open_shard(location) as shard:
            assert shard.num_bytes == local[1].stat().st_size
            keys = [one.key for one in shards.scan_file(shard, location)]
        assert keys == ["00000002", "00000003"]


def test_what_cannot_be_read(local: list[Path], server: Server) -> None:
    with pytest.raises(ConfigError, match="credentials into the environment") as caught:
        locations.find_shards(["https://user:secret@host/a.tar"])
    assert "secret" not in str(caught.value)
    with pytest.raises(DataError, match="no such file"):
        locations.find_shards([str(local[0]) + "x"])
    gone = server.url(local[0]) + "x"
    with pytest.raises(TransientError), locations.open_shard(gone, Storage(BRIEF)):
        pass
