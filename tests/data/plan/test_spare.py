import dataclasses

import numpy as np
import pytest

from tests.data.random_rows import make_rows
from vlm.data.plan import spare
from vlm.data.plan.policy import Rows

ROWS = dataclasses.replace(make_rows(900), first_rows=np.array([0, 300, 700, 900]))
CHOSEN = np.random.default_rng(0).random(900) < 0.9


def expected(row: int) -> list[set[int]]:
    """The three classes, by a loop over all rows."""
    source = np.searchsorted([300, 700], row, "right")
    classes: list[set[int]] = [set(), set(), set()]
    for other in range(900):
        frames = int(ROWS.num_frames[other])
        length = int(ROWS.num_tokens[other]) + frames
        fits = frames <= ROWS.num_frames[row]
        fits &= length <= int(ROWS.num_tokens[row]) + int(ROWS.num_frames[row])
        if not fits or not CHOSEN[other] or other == row:
            continue
        if ROWS.kind[other] == ROWS.kind[row]:
            same = np.searchsorted([300, 700], other, "right") == source
            classes[0 if same else 1].add(other)
        elif ROWS.kind[other] < ROWS.kind[row]:
            classes[2].add(other)
    return classes


def found(row: int, epoch: int = 0, rows: Rows = ROWS) -> list[int]:
    return list(spare.substitutes(rows, CHOSEN, 1, seed=3, epoch=epoch, row=row))


@pytest.mark.parametrize("chunk", [1 << 16, 50])
@pytest.mark.parametrize("row", [0, 299, 300, 512, 699, 700, 899])
def test_all_that_fit_come_nearest_class_first(
    row: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spare, "_CHUNK", chunk)
    rows = found(row)
    for one in expected(row):
        assert set(rows[: len(one)]) == one
        rows = rows[len(one) :]
    assert not rows


def test_the_order_is_drawn_for_the_row_and_the_epoch() -> None:
    row = int(np.argmax(ROWS.num_tokens + 100 * ROWS.num_frames))
    assert len(found(row)) > 100
    assert found(row) == found(row)
    assert found(row) != found(row, epoch=1)
    assert found(row) != sorted(found(row))


def test_the_smallest_of_all_has_no_substitute() -> None:
    tokens = ROWS.num_tokens.copy()
    row = int(np.flatnonzero(ROWS.kind == 0)[0])
    tokens[row] = 0
    assert found(row, rows=dataclasses.replace(ROWS, num_tokens=tokens)) == []
