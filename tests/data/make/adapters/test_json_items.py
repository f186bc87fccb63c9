import json
from pathlib import Path
from typing import Any

import pytest

from vlm.data.make.adapters import json_items as module
from vlm.data.make.adapters.json_items import json_items
from vlm.errors import DataError

ITEMS: list[Any] = [
    {"id": 1, "text": 'quotes " and \\ brackets ]}', "nested": {"data": [1, [2, {"a": None}]]}},
    {"id": 2, "text": "\u00e9\u4e2d\U0001f600", "empty": {}},
    "a string",
    -12.5e3,
    123456789,
    [],
    True,
]


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_items_are_those_of_the_json_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, indent: int | None
) -> None:
    monkeypatch.setattr(module, "CHUNK_CHARS", chunk)
    text = json.dumps(ITEMS, indent=indent)
    assert list(json_items(write(tmp_path, text))) == json.loads(text)
    whole = {"info": {"data": 1}, "images": [{"data": []}, 2], "data": ITEMS, "rest": 7}
    text = json.dumps(whole, indent=indent, ensure_ascii=False)
    assert list(json_items(write(tmp_path, text), "data")) == json.loads(text)["data"]
    assert list(json_items(write(tmp_path, text), "images")) == whole["images"]


def test_a_byte_order_mark_and_an_empty_array(tmp_path: Path) -> None:
    assert list(json_items(write(tmp_path, b"\xef\xbb\xbf [ ]\n"))) == []
    assert list(json_items(write(tmp_path, '{"a": []}'), "a")) == []


def test_numbers_and_bytes_that_are_none_spoil_one_value_only(tmp_path: Path) -> None:
    raw = b'[{"a": NaN, "b": -Infinity, "c": ' + b"9" * 5000 + b', "d": "x\xff"}, 2]'
    first, second = json_items(write(tmp_path, raw))
    assert first == {"a": None, "b": None, "c": None, "d": "x\udcff"}
    assert second == 2


def test_what_is_read_stays_small(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps([{"text": "x" * 1000}] * 5000))
    items = json_items(path)
    next(items)
    stream = items.gi_frame.f_locals["stream"]
    assert 0 < len(stream.text) <= module.CHUNK_CHARS < path.stat().st_size


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        ('[{"a": 1}, {"a": ', None, "at character 11"),
        ('[{"a": 1}', None, "it ends at character 9"),
        ('[{"a": 1} {"b": 2}]', None, "found '{' at character 10"),
        ('{"a": 1}', None, "found '{' at character 0"),
        ("", None, "it ends at character 0"),
        ("<html>", None, "found '<' at character 0"),
        ('{"a": [1]}', "data", "no key 'data'"),
        ("{}", "data", "no key 'data'"),
        ('{"data": 3}', "data", "found '3' at character 9"),
        ("[1, tru]", None, "at character 4"),
        ("[" * 100_000, None, "nested too deeply"),
    ],
)
def test_a_damaged_file_is_a_mistake(
    tmp_path: Path, text: str, key: str | None, reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        list(json_items(write(tmp_path, text), key))


def test_a_value_without_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_CHARS", 16)
    monkeypatch.setattr(module, "MAX_ITEM_CHARS", 64)
    path = write(tmp_path, '["' + "x" * 1_000_000)
    with pytest.raises(DataError, match="Unterminated string"):
        list(json_items(path))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        list(json_items(tmp_path / "none.json"))
