import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.data.make.adapters.published import (
    IMAGE,
    cell,
    picture,
    sort_out,
    write_json,
    write_parquet,
)
from vlm.data.make.adapters import alt_texts
from vlm.data.make.adapters.alt_texts import CaptionOptions, DocOrNotOptions, TextCapsOptions
from vlm.data.make.adapters.base import NoOptions
from vlm.data.make.media import MediaReader
from vlm.errors import DataError


def write(path: Path, column: str, values: list[Any], *numbers: int | None) -> Path:
    rows = [{"image": cell(n), column: v} for n, v in zip(numbers, values, strict=True)]
    return write_parquet(path, rows, image=IMAGE)


def test_flickr30k_as_a_table(tmp_path: Path) -> None:
    values = ["Two men.", "", None, "A girl."]
    write(tmp_path / "data" / "test-00000-of-00003.parquet", "alt_text", values, 1, 2, 3, None)
    (found,), failures = sort_out(alt_texts.flickr30k(tmp_path, CaptionOptions()))
    assert (found.caption, found.source) == ("Two men.", "flickr30k")
    with MediaReader(tmp_path) as media:
        assert media.open(found.images[0]).read() == picture(1)
    parts = ("!1: no caption", "!2: no caption", "!3: Value error, the image is empty")
    for failure, part in zip(failures, parts, strict=True):
        assert part in failure.error


def test_flickr30k_as_the_token_file(tmp_path: Path) -> None:
    (tmp_path / "flickr30k-images").mkdir()
    (tmp_path / "results_20130124.token").write_bytes(
        b"1000.jpg#0\tTwo men .\n1000.jpg#1\tMen outside .\n2000.jpg#0\tA \xff girl .\n\n"
    )
    found, failures = sort_out(alt_texts.flickr30k(tmp_path, CaptionOptions(captions="all")))
    assert [(a.caption, a.images) for a in found] == [
        ("Two men .", ("flickr30k-images/1000.jpg",)),
        ("Men outside .", ("flickr30k-images/1000.jpg",)),
    ]
    assert found[1].meta == {"captions": ["Two men .", "Men outside ."]}
    assert len({a.split_identity for a in found}) == 1
    assert [failure.error for failure in failures] == [
        "results_20130124.token, line 3: not UTF-8",
        "results_20130124.token, line 4: expected NAME#N and a caption",
    ]


def test_textcaps_as_a_table_of_lists(tmp_path: Path) -> None:
    rows = [
        {"image": cell(1), "caption_str": ["A sign.", "A stop sign."]},
        {"image": cell(2), "caption_str": []},
    ]
    path = tmp_path / "data" / "train-00000-of-00022.parquet"
    write_parquet(path, rows, image=IMAGE, caption_str=pa.list_(pa.string()))
    found, failures = sort_out(alt_texts.textcaps(tmp_path, TextCapsOptions(captions="all")))
    assert [a.caption for a in found] == ["A sign.", "A stop sign."]
    assert ["no caption" in failure.error for failure in failures] == [True]


def test_textcaps_as_published(tmp_path: Path) -> None:
    items: list[Any] = [
        {"image_id": "0054c", "caption_str": "A sign.", "reference_strs": []},
        {"image_id": "99", "caption_str": "A book."},
        {"image_id": "0054c", "caption_str": "A stop sign."},
        {"image_id": 3, "caption_str": "x"},
        {"image_id": "4"},
    ]
    write_json(tmp_path / "TextCaps_0.1_val.json", {"dataset_name": "textcaps", "data": items})
    with zipfile.ZipFile(tmp_path / "train_val_images.zip", "w") as archive:
        archive.writestr("train_images/0054c.jpg", picture(1))
    options = TextCapsOptions(part="val")
    found, failures = sort_out(alt_texts.textcaps(tmp_path, options))
    assert [(a.caption, a.split_key) for a in found] == [
        ("A sign.", "0054c.jpg"),
        ("A book.", "99.jpg"),
    ]
    with MediaReader(tmp_path) as media:
        assert media.open(found[0].images[0]).read() == picture(1)
    assert [failure.error.split(":")[1] for failure in failures] == [" image_id", " caption_str"]


def test_only_documents_get_the_fixed_text(tmp_path: Path) -> None:
    labels = [1, 0, 1, 0, None, 1, 1]
    path = tmp_path / "data" / "train-00000-of-00008.parquet"
    write(path, "is_document", labels, *range(7))
    found, failures = sort_out(alt_texts.docornot(tmp_path, DocOrNotOptions()))
    assert [a.images[0].split("!")[1] for a in found] == [f"{i}/image" for i in (0, 2, 5, 6)]
    assert {a.caption for a in found} == {"Text document."}
    assert ["`is_document` is nothing" in failure.error for failure in failures] == [True]
    few, _ = sort_out(alt_texts.docornot(tmp_path, DocOrNotOptions(rows=3)))
    assert few == found[:2]


def test_alt_texts_that_people_corrected(tmp_path: Path) -> None:
    path = tmp_path / "data" / "train-00000-of-00003.parquet"
    write(path, "gpt_alt_text", ["A cat.", "  ", None], 1, 2, 3)
    (found,), failures = sort_out(alt_texts.alt_text_validation(tmp_path, NoOptions()))
    assert (found.caption, found.source) == ("A cat.", "alt-text-validation")
    assert len(failures) == 2


def test_texts_of_another_type_become_failures(tmp_path: Path) -> None:
    path = tmp_path / "data" / "train-00000-of-00003.parquet"
    write(path, "gpt_alt_text", [1, 2], 1, 2)
    found, failures = sort_out(alt_texts.alt_text_validation(tmp_path, NoOptions()))
    assert found == []
    assert ["`gpt_alt_text` is not text" in failure.error for failure in failures] == [True, True]


def test_no_data_set_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no data/\*\.parquet"):
        list(alt_texts.flickr30k(tmp_path, CaptionOptions()))
    write_json(tmp_path / "TextCaps_0.1_train.json", {"data": []})
    with pytest.raises(DataError, match="holds neither train_images"):
        list(alt_texts.textcaps(tmp_path, TextCapsOptions()))
