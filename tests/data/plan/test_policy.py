import dataclasses

import numpy as np
import pytest

from tests.data.random_rows import make_policy, make_rows
from vlm.data.format import schema
from vlm.data.plan import policy
from vlm.errors import DataError

ROWS = make_rows(500)
ALL = np.ones(500, bool)


def change(row: int, **values: int) -> policy.Rows:
    columns = {name: getattr(ROWS, name).copy() for name in values}
    for name, value in values.items():
        columns[name][row] = value
    return dataclasses.replace(ROWS, **columns)


def test_kinds_are_those_of_the_schema() -> None:
    assert policy.KINDS == schema.KINDS


def test_sizes_count_placeholders_and_do_not_overflow() -> None:
    rows = change(3, kind=2, num_frames=60, num_tokens=2**32 - 1)
    lengths, frames = rows.sizes(np.array([3]), tokens_per_frame=100)
    assert lengths.tolist() == [2**32 - 1 + 6000]
    assert frames.tolist() == [60]


def test_light_rows_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_policy(budget=2000)
    frames, tokens = ROWS.num_frames.tolist(), ROWS.num_tokens.tolist()
    expected = sum(t + f + 16 * f <= 1000 for f, t in zip(frames, tokens, strict=True))
    assert 0 < expected < 500
    assert policy.check(ROWS, ALL, made) == expected
    monkeypatch.setattr(policy, "_CHUNK", 7)
    assert policy.check(ROWS, ALL, made) == expected


def test_a_row_above_the_budget_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "_CHUNK", 100)
    rows = change(321, kind=2, num_frames=64, num_tokens=4000)
    costs = ROWS.num_tokens.astype(int) + 17 * ROWS.num_frames.astype(int)
    costs[321] = 4000 + 17 * 64
    made = make_policy(budget=1200)
    with pytest.raises(DataError) as caught:
        policy.check(rows, ALL, made)
    assert str(caught.value).startswith(f"{(costs > 1200).sum()} samples cost more than")
    for part in ("data.budget=1200", "row 321", "64 frames", "4000 text tokens", "costs 5088"):
        assert part in str(caught.value)


def test_rows_that_are_not_chosen_are_not_checked() -> None:
    rows = change(3, kind=0, num_frames=0, num_tokens=10**6)
    policy.check(rows, ALL & (np.arange(500) != 3), make_policy())
    with pytest.raises(DataError, match="row 3,"):
        policy.check(rows, ALL, make_policy())


def test_exactly_the_budget_fits() -> None:
    rows = change(3, kind=0, num_frames=0, num_tokens=4096)
    policy.check(rows, ALL, make_policy())


@pytest.mark.parametrize(
    "values",
    [
        {"kind": 3, "num_frames": 1},
        {"kind": 0, "num_frames": 1},
        {"kind": 2, "num_frames": 0},
        {"kind": 0, "num_frames": 0, "num_tokens": 0},
    ],
)
def test_rows_that_contradict_themselves_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(DataError, match="manifest row 77: kind"):
        policy.check(change(77, **values), ALL, make_policy())
