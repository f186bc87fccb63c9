"""Which requests are made, when, and that nothing waits in vain."""

import itertools
import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from tests.waiting import wait_for
from vlm.data.storage import ahead
from vlm.data.storage.ahead import Range, ReadAhead, merge


class _Storage:
    """Remembers what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[tuple[int, int]], str]] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def fetch(self, location: str, parts: list[tuple[int, int]], version: str) -> None:
        self.go_on.wait()
        self.asked.append((location, parts, version))


def make(storage: _Storage, size: int, max_bytes: int) -> Any:
    """Item i reads ``size`` bytes of one shard; neighbours follow each other."""

    def ranges(item: int) -> Iterator[Range]:
        if size:
            yield Range("s3://b/a.tar", "v", size * item, size)

    return ReadAhead(storage, ranges, 2, max_bytes)  # type: ignore[arg-type]


def test_items_come_in_order_with_their_ranges() -> None:
    storage = _Storage()
    for item, fetches in make(storage, 100, 1000)(iter(range(50))):
        ((range_, fetch),) = fetches.items()
        assert range_.offset == 100 * item
        fetch.result()
    parts = [part for _, parts, _ in storage.asked for part in parts]
    assert sorted(parts) == [(100 * i, 100) for i in range(50)]
    assert len(storage.asked) < 15, "neighbours share a request"


def test_no_more_than_allowed_is_under_way() -> None:
    storage, taken = _Storage(), []
    items = (taken.append(i) or i for i in itertools.count())  # type: ignore[func-returns-value]
    with closing(make(storage, 100, 1000)(items)) as steps:
        for number in range(40):
            next(steps)
            assert 1 <= len(taken) - number <= 11


def test_local_items_are_not_taken_ahead() -> None:
    storage, taken = _Storage(), []
    items = (taken.append(i) or i for i in itertools.count())  # type: ignore[func-returns-value]
    with closing(make(storage, 0, 1000)(items)) as steps:
        for number in range(10):
            assert next(steps) == (number, {})
            assert len(taken) == number + 1
    assert not storage.asked


def test_leaving_ends_it() -> None:
    storage = _Storage()
    storage.go_on.clear()
    before = set(threading.enumerate())
    steps = make(storage, 100, 1000)(itertools.count())
    next(steps)
    storage.go_on.set()
    steps.close()
    wait_for(lambda: set(threading.enumerate()) <= before)


def test_neighbours_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "MAX_GAP_BYTES", 10)
    monkeypatch.setattr(ahead, "MAX_REQUEST_BYTES", 100)
    found = [
        Range("a", "v", 0, 30),
        Range("a", "v", 40, 30),  # a gap of 10
        Range("a", "v", 81, 5),  # of 11
        Range("a", "v", 86, 90),
        Range("a", "v", 176, 30),  # too long together
        Range("a", "w", 206, 1),  # another version
        Range("b", "v", 207, 1),
    ]
    groups = list(merge([*reversed(found), found[0]]))
    assert groups == [found[:2], found[2:4], found[4:5], found[5:6], found[6:]]
