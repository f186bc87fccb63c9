from collections.abc import Iterator
from typing import Any

import pytest

from vlm.data.make.adapters.base import each, want
from vlm.data.make.adapters.records import Record
from vlm.data.make.annotations import Annotation, Failure
from vlm.errors import SampleError


def test_a_record_that_cannot_be_used_is_a_failure_and_the_next_one_follows() -> None:
    unread = Failure(reason="unreadable record", error="a.csv, row 1: x")
    records = [unread, *[Record(f"a.csv, row {i}", i, {"i": i}) for i in range(2, 6)]]

    def make(record: Record) -> Iterator[Annotation]:
        yield Annotation(id=record.row, source="s", caption="x")
        if record.row == 3:
            raise SampleError("odd")
        if record.row == 4:
            yield Annotation(id=record.row, source="", caption="x")

    found = list(each(records, make))
    assert found[0] == unread
    assert [item.id for item in found if isinstance(item, Annotation)] == [2, 3, 4, 5]
    errors = [item.error for item in found if isinstance(item, Failure)][1:]
    assert errors[0] == "a.csv, row 3: odd"
    assert errors[1].startswith("a.csv, row 4: source: ")


def test_our_own_bugs_are_no_failures() -> None:
    def make(record: Record) -> Iterator[Annotation]:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        list(each([Record("x", 0, {})], make))


@pytest.mark.parametrize(
    ("value", "kind", "found"),
    [(None, str, "nothing"), (5, str, "int"), (True, int, "bool"), ("x", int, "str")],
)
def test_fields_have_a_type(value: Any, kind: type, found: str) -> None:
    with pytest.raises(SampleError, match=f"`a` is {found}; expected {kind.__name__}"):
        want({"a": value}, "a", kind)


def test_fields_that_fit() -> None:
    assert want({"a": "x"}, "a", str) == "x"
    assert want({"a": True}, "a", bool) is True
