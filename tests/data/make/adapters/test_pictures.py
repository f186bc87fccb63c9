import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.make.adapters.published import IMAGE, cell, picture, write_parquet
from vlm.data.make.adapters import pictures
from vlm.data.make.adapters.records import Record
from vlm.data.make.annotations import Failure
from vlm.data.make.media import MediaReader
from vlm.errors import DataError, SampleError


def test_images_become_refs_and_hashes(tmp_path: Path) -> None:
    rows = [
        {"one": cell(1), "many": [cell(2), None, cell(1)], "raw": picture(3), "text": "a"},
        {"one": cell(None), "many": [], "raw": None, "text": None},
        {"one": {"bytes": None, "path": "a.jpg"}, "many": None, "raw": b"", "text": "b"},
    ]
    path = tmp_path / "sub" / "a.parquet"
    write_parquet(path, rows, one=IMAGE, many=pa.list_(IMAGE), raw=pa.binary())
    first, second, third = pictures.table(tmp_path, ("*/*.parquet",), None)
    assert isinstance(first, Record) and isinstance(third, Record)
    assert (first.where, first.row) == ("sub/a.parquet!0", 0)
    shown = {"one": 1, "many/0": 2, "many/2": 1, "raw": 3}
    expected = {
        name: {
            "ref": f"sub/a.parquet!0/{name}",
            "key": hashlib.blake2b(picture(number), digest_size=16).hexdigest(),
        }
        for name, number in shown.items()
    }
    assert first.fields == {
        "one": expected["one"],
        "many": [expected["many/0"], None, expected["many/2"]],
        "raw": expected["raw"],
        "text": "a",
    }
    with MediaReader(tmp_path) as media:
        for name, number in shown.items():
            assert media.open(expected[name]["ref"]).read() == picture(number)
    assert second == Record(
        "sub/a.parquet!1", 1, {"one": None, "many": [], "raw": None, "text": None}
    )
    assert third.fields["one"] is None


def test_text_that_is_no_utf8_spoils_one_row(tmp_path: Path) -> None:
    raw = pa.array([b"ok", b"\xff\xfe", b"fine"])
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": text}), path)
    found = list(pictures.table(tmp_path, ("*.parquet",), ("text",)))
    assert [r.fields["text"] for r in found if isinstance(r, Record)] == ["ok", "fine"]
    assert [r.error for r in found if isinstance(r, Failure)] == ["a.parquet, row 1: not UTF-8"]


def test_a_missing_column_is_a_mistake(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"text": "a", "other": 1}])
    with pytest.raises(DataError, match="no column image; found text"):
        list(pictures.table(tmp_path, ("*.parquet",), ("text", "image")))


def test_the_first_place_that_is_there(tmp_path: Path) -> None:
    places = ("a/b", "b.zip!", "b.zip!in/side")
    with pytest.raises(DataError, match=r"holds neither a/b nor b\.zip! nor b\.zip!in/side"):
        pictures.find_folder(tmp_path, places)
    (tmp_path / "b.zip").touch()
    assert pictures.find_folder(tmp_path, places) == "b.zip!"
    assert pictures.find_folder(tmp_path, places[2:]) == "b.zip!in/side/"
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert pictures.find_folder(tmp_path, places) == "a/b/"


def test_which_captions() -> None:
    texts = ["", "one", " ", "two", "three"]
    assert pictures.pick_captions(texts, "first", "x") == [(1, "one")]
    assert pictures.pick_captions(texts, "all", "x") == [(1, "one"), (3, "two"), (4, "three")]
    drawn = [pictures.pick_captions(texts, "random", str(i))[0] for i in range(300)]
    assert drawn == [pictures.pick_captions(texts, "random", str(i))[0] for i in range(300)]
    assert [75 < drawn.count(one) < 125 for one in ((1, "one"), (3, "two"), (4, "three"))] == [
        True
    ] * 3
    with pytest.raises(SampleError, match="no caption"):
        pictures.pick_captions(["", "\n"], "all", "x")
