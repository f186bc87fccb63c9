"""What is written and counted of bad samples. Finding them is in test_bad_shards.py."""

import json
from pathlib import Path

import pytest

from tests.data import helpers
from tests.data.conftest import IMAGE_TOKEN
from vlm.data.load import faults
from vlm.data.load.faults import BadSamples, Fault
from vlm.data.manifest import manifest
from vlm.data.plan import catalog
from vlm.data.plan.catalog import Catalog
from vlm.errors import DataError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Catalog:
    folder = tmp_path_factory.mktemp("faults")
    paths = helpers.write_shards(folder / "shards", [2, 1, 0, 3], per_shard=2)
    manifest.build(paths, str(tokenizer_path), IMAGE_TOKEN, folder / "m.parquet")
    return catalog.load([("train", folder / "m.parquet", 1)])


def test_a_line_for_each_bad_row(data: Catalog, tmp_path: Path) -> None:
    path = tmp_path / faults.FILE
    bad = BadSamples(data, 1.0, path, quarantine=[2])
    assert 2 in bad and 3 not in bad and bad.quarantine == (2,)
    bad.record(0, 0, [], "rank 0")
    bad.record(
        3, 1, [Fault(3, "x, member 00000003.001.jpg: no\nJPEG"), Fault(2, "again")], "rank 0"
    )
    bad.record(3, 1, [Fault(3, "found bad before")], "rank 0")
    (line,) = [json.loads(text) for text in path.read_text().splitlines()]
    found, own = data.locate(3)
    assert line == {
        "row": 3,
        "shard": str(data.shards[1].path),
        "offset": int(found.offset[own]),
        "key": "00000003",
        "member": "00000003.001.jpg",
        "reason": "x, member 00000003.001.jpg: no JPEG",
        "stand_in": 1,
        "where": "rank 0",
    }
    assert bad.quarantine == (2, 3) and (bad.num_seen, bad.num_replaced) == (3, 2)


def test_members_are_found_in_messages(data: Catalog, tmp_path: Path) -> None:
    messages = {
        "a.tar at byte 0, key 1: member '../x y.jpg' is in a folder": "../x y.jpg",
        "a.tar at byte 0, key 1, member 1.json: turns: missing": "1.json",
        "a.tar at byte 0, key 1: found 3 of 9 bytes": None,
    }
    for number, (message, member) in enumerate(messages.items()):
        path = tmp_path / f"{number}.jsonl"
        BadSamples(data, 1.0, path).record(0, 1, [Fault(0, message)], "")
        assert json.loads(path.read_text())["member"] == member


def test_too_many_stop_the_run_but_not_the_first_few(data: Catalog) -> None:
    bad = BadSamples(data, 0.1, None)
    for _ in range(faults.FREE):
        bad.record(0, 1, [Fault(0, "no")], "")
    with pytest.raises(DataError, match=r"9 of 9 samples are bad.*=0.1; .*key 00000000"):
        bad.record(0, 1, [Fault(0, "no")], "")


def test_few_among_many_do_not(data: Catalog) -> None:
    bad = BadSamples(data, 0.1, None)
    for number in range(1000):
        bad.record(0, int(number % 11 == 10), [Fault(0, "no")] if number % 11 == 10 else [], "")
    assert bad.num_replaced == 90
