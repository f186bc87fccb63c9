"""Which samples are shown, and what is said of those that cannot be."""

import numpy as np
import pytest

from tests.train import helpers, runs
from tests.train.test_loop import open_source
from vlm.data.load.reader import Reader
from vlm.errors import SampleError, TransientError
from vlm.train import held_out


@pytest.mark.parametrize("count,expected", [(0, []), (1, [1]), (2, [1, 9]), (3, [1, 5, 9])])
def test_they_are_evenly_spaced_among_the_usable(count: int, expected: list[int]) -> None:
    assert held_out.choose(np.arange(10) % 2 == 1, count) == expected
    assert held_out.choose(np.arange(10) % 2 == 1, 99) == [1, 3, 5, 7, 9]
    assert held_out.choose(np.zeros(10, bool), count) == []


def test_one_that_cannot_be_read_leaves_its_place(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    catalog = open_source(helpers.recipe(runs.new_folder()), training=False).catalog
    plain = Reader.read

    def read(self: Reader, row: int, *rest: object) -> object:
        if row == 1:
            raise SampleError("shard x: bad\nline")
        if row == 2:
            raise TransientError("gone")
        return plain(self, row)

    monkeypatch.setattr(Reader, "read", read)
    found = list(held_out.read(catalog, [0, 1, 2, 3]))
    assert [key for key, _ in found] == catalog.keys([0, 1, 2, 3])
    assert [loaded is None for _, loaded in found] == [False, True, True, False]
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"held-out sample left out: {what}" for what in ("shard x: bad line", "gone")]
