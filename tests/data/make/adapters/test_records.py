import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlm.data.make.adapters import records
from vlm.data.make.adapters.records import Record, find, read
from vlm.data.make.annotations import Failure
from vlm.errors import DataError

ROWS = [{"a": f"text {i}", "b": f"{i}"} for i in range(2500)]


def write_rows(path: Path) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=700)
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in ROWS))
    else:
        with path.open("w", newline="") as file:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(file, ["a", "b"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
    return path


def fields(path: Path, **options: Any) -> list[dict[str, Any] | None]:
    return [r.fields if isinstance(r, Record) else None for r in read(path, **options)]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_every_kind_gives_the_same(tmp_path: Path, suffix: str) -> None:
    found = list(read(write_rows(tmp_path / f"a.{suffix}")))
    assert [record.fields for record in found if isinstance(record, Record)] == ROWS
    rows = [record.row for record in found if isinstance(record, Record)]
    assert rows == list(range(0, 5000, 2) if suffix == "jsonl" else range(2500))


def test_columns_of_a_table(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.parquet")
    assert fields(path, columns=["b", "none"])[7] == {"b": "7"}


def test_faulty_lines_are_one_failure_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 100)
    path = tmp_path / "a.jsonl"
    lines = [b'{"a": 1}', b"x" * 1000, b"{", b"[1]", b'{"a": NaN}', b"[" * 90, b'{"a": 2}']
    path.write_bytes(b"\n".join(lines))
    assert fields(path) == [{"a": 1}, None, None, None, None, None, {"a": 2}]
    failures = [item for item in read(path) if isinstance(item, Failure)]
    assert [f.error.partition(":")[0] for f in failures] == [
        f"a.jsonl, line {i}" for i in range(2, 7)
    ]


def test_rows_of_another_width(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('a,b\n1,2\n1\n1,2,3\n"1,\n2",3\n')
    assert fields(path) == [{"a": "1", "b": "2"}, None, None, {"a": "1,\n2", "b": "3"}]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("no table")
    for name in ("a.parquet", "none.csv", "none.jsonl", "none.json", "a.xml"):
        with pytest.raises(DataError, match=name):
            list(read(tmp_path / name))


def test_finding_files(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv", "x/c.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find(tmp_path, "*.csv", "*/*.csv", "a*") == [
        tmp_path / name for name in ("a.csv", "b.csv", "x/c.csv")
    ]
    with pytest.raises(DataError, match=r"holds no \*.tsv, y/\*; expected"):
        find(tmp_path, "*.tsv", "y/*")
