"""The whole loader over shards that lie on servers with every habit: batches as from the disk."""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.data import helpers
from tests.data.collators import make_collator
from tests.data.conftest import IMAGE_TOKEN
from tests.data.load.test_loader import content, make_plan
from tests.data.servers import Server, hub, object_store, serve
from vlm.config import AugmentConfig, DataConfig, StorageConfig
from vlm.data.load.collate import Collator
from vlm.data.load.loader import LoadedStep, Loader
from vlm.data.manifest import manifest
from vlm.data.plan import catalog
from vlm.data.plan.catalog import Catalog
from vlm.data.storage import locations
from vlm.data.storage.storage import Patience, Storage
from vlm.errors import TransientError

COUNTS = [(i * 5) % 8 + 1 for i in range(40)] + [0] * 14
PER_SHARD = 9
NUM_STEPS = 8


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Catalog:
    folder = tmp_path_factory.mktemp("remote_loading")
    paths = helpers.write_shards(folder / "shards", COUNTS, PER_SHARD)
    manifest.build(paths, str(tokenizer_path), IMAGE_TOKEN, folder / "m.parquet")
    return catalog.load([("train", folder / "m.parquet", 1)])


def moved(local: Catalog, to: Callable[[Path], str]) -> Catalog:
    """The same samples, whose shards lie elsewhere."""
    (source,) = local.sources
    shards = [dataclasses.replace(s, location=to(s.path)) for s in source.manifest.shards]
    there = dataclasses.replace(source.manifest, shards=shards)
    return catalog.join([catalog.Source("train", there)])


@pytest.fixture
def collator(tokenizer: PreTrainedTokenizerFast) -> Collator:
    return make_collator(tokenizer, seed=7, augment=AugmentConfig(shift_px=1))


def load(
    data: Catalog,
    collator: Collator,
    cache: Path,
    timeout_s: float = 60.0,
    give_up_s: float = 60.0,
    count: int = NUM_STEPS,
) -> list[LoadedStep]:
    """A busy machine is never taken for a server that stalls, unless ``timeout_s`` is short."""
    storage = StorageConfig(
        cache_dir=cache, cache_gb=0.1, timeout_s=timeout_s, give_up_s=give_up_s, connections=2
    )
    config = DataConfig(train="unused", eval="unused", micro_batches=4, budget=150, storage=storage)
    loader = Loader(data, make_plan(data), collator, config, rank=0, world_size=1)
    with closing(iter(loader)) as steps:  # type: ignore[type-var]
        return list(itertools.islice(steps, count))


def batches(steps: list[LoadedStep]) -> list[tuple]:
    return [content(batch) for step in steps for batch in step.batches]


@pytest.mark.parametrize(
    ("ranges", "how", "failures"),
    [
        (True, "reset", 0),
        (False, "reset", 0),
        (True, "reset", 5),
        (True, "stall", 2),
        (False, "stall", 2),
        (True, "503", 5),
    ],
)
def test_an_http_server(
    local: Catalog, collator: Collator, tmp_path: Path, ranges: bool, how: str, failures: int
) -> None:
    folder = local.shards[0].path.parent
    found = load(local, collator, tmp_path / "unused")
    num_samples = sum(len(batch.keys) for step in found for batch in step.batches)
    expected, timeout_s = batches(found), 0.5 if how == "stall" else 60.0
    with serve(Server(folder, ranges=ranges, how=how, failures=failures)) as server:
        there = moved(local, server.url)
        assert batches(load(there, collator, tmp_path / "cache", timeout_s)) == expected
        asked = len(server.asked)
        assert asked < num_samples / 5, "neighbours share requests"
        assert batches(load(there, collator, tmp_path / "cache", timeout_s)) == expected
        assert len(server.asked) == asked, "all of it is in the cache"


def test_an_s3_store(
    local: Catalog, collator: Collator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with object_store(monkeypatch) as bucket:
        import s3fs  # an optional dependency: object_store skips without it

        for shard in local.shards:
            s3fs.S3FileSystem().put(str(shard.path), f"{bucket}/{shard.path.name}")
        there = moved(local, lambda path: f"{bucket}/{path.name}")
        found = batches(load(there, collator, tmp_path / "cache"))
    assert found == batches(load(local, collator, tmp_path / "unused"))


def test_the_hub(
    local: Catalog, collator: Collator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [shard.path for shard in local.shards]
    brief = Storage(Patience(timeout_s=5.0, give_up_s=1.0))
    with hub(monkeypatch, paths, tmp_path / "hub") as server:
        urls = locations.find_shards(["hf://datasets/org/name"], brief)
        assert urls == [f"hf://datasets/org/name/{path.name}" for path in paths]
        with locations.open_shard(urls[0], brief) as shard:
            assert bytes(shard.read(512, 1024)) == paths[0].read_bytes()[512:1536]
            assert shard.version == hashlib.sha1(paths[0].read_bytes()).hexdigest()
        there = moved(local, lambda path: f"hf://datasets/org/name/{path.name}")
        found = batches(load(there, collator, tmp_path / "cache"))
        assert any(asked[1].startswith("bytes=") for asked in server.asked)
    assert found == batches(load(local, collator, tmp_path / "unused"))


def test_some_shards_may_be_here_and_others_there(
    local: Catalog, collator: Collator, tmp_path: Path
) -> None:
    """The first one, too, which says nothing about the others."""
    shards = local.shards
    with serve(Server(shards[0].path.parent)) as server:
        there = moved(local, lambda path: str(path) if path == shards[0].path else server.url(path))
        found = batches(load(there, collator, tmp_path / "cache"))
        assert len(server.asked) < 3 * len(shards), "read ahead, several samples to a request"
    assert found == batches(load(local, collator, tmp_path / "unused"))


def test_a_server_that_is_gone_stops_the_run_and_replaces_nothing(
    local: Catalog, collator: Collator, tmp_path: Path
) -> None:
    with gone_server(local) as there, pytest.raises(TransientError, match="shard http://127.0.0.1"):
        load(there, collator, tmp_path / "cache", give_up_s=0.5, count=1)


@contextmanager
def gone_server(local: Catalog) -> Iterator[Catalog]:
    with serve(Server(local.shards[0].path.parent)) as server:
        there = moved(local, server.url)
    yield there
