import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.data.make.adapters.published import picture, sort_out, write_json, write_picture
from vlm.data.make.adapters import coco_captions
from vlm.data.make.adapters.coco_captions import Options, image_key
from vlm.data.make.media import MediaReader
from vlm.errors import DataError

FIVE = [f"caption {i}" for i in range(5)]


def write(root: Path, images: list[Any], annotations: list[Any], name: str = "train2017") -> Path:
    content = {
        "info": {"year": 2017},
        "images": images,
        "licenses": [{"id": 1, "name": "Attribution-NonCommercial"}],
        "annotations": annotations,
    }
    return write_json(root / "annotations" / f"captions_{name}.json", content)


def of(image: int, captions: list[str]) -> list[dict[str, Any]]:
    return [{"image_id": image, "id": 1, "caption": caption} for caption in captions]


def image(number: int) -> dict[str, Any]:
    return {"id": number, "file_name": f"{number:012d}.jpg", "height": 30, "width": 40}


def test_which_captions(tmp_path: Path) -> None:
    write(tmp_path, [image(i) for i in range(40)], [c for i in range(40) for c in of(i, FIVE)])
    (tmp_path / "train2017").mkdir()
    first, _ = sort_out(coco_captions.annotations(tmp_path, Options()))
    assert [a.caption for a in first] == ["caption 0"] * 40
    assert first[3].images == ("train2017/000000000003.jpg",)
    assert first[3].meta["captions"] == FIVE
    every, _ = sort_out(coco_captions.annotations(tmp_path, Options(captions="all")))
    assert [a.caption for a in every] == FIVE * 40
    assert len({a.id for a in every}) == 200
    drawn, _ = sort_out(coco_captions.annotations(tmp_path, Options(captions="random")))
    again, _ = sort_out(coco_captions.annotations(tmp_path, Options(captions="random")))
    assert drawn == again
    assert {a.caption for a in drawn} == set(FIVE)


def test_images_may_stay_in_their_zip(tmp_path: Path) -> None:
    write(tmp_path, [image(9)], of(9, ["A bowl."]), "val2017")
    with zipfile.ZipFile(tmp_path / "val2017.zip", "w") as archive:
        archive.writestr("val2017/000000000009.jpg", picture(9))
    (found,), _ = sort_out(coco_captions.annotations(tmp_path, Options(part="val")))
    with MediaReader(tmp_path) as media:
        assert media.open(found.images[0]).read() == picture(9)


def test_all_sources_of_an_image_split_alike() -> None:
    for place in ("", "coco/train2017/", "COCO_train2014_", "val2014/COCO_val2014_"):
        assert image_key(f"{place}000000000042.jpg") == "coco/000000000042"
    assert image_key("GCC_train_000000042.jpg") is None


def test_records_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        [image(1), image(2), {"id": 3}, {"id": 4, "file_name": "../../secret.jpg"}, "five"],
        [*of(1, ["A dog."]), *of(2, ["  "]), *of(4, ["A cat."]), {"image_id": 1}, None],
    )
    path.write_bytes(path.read_bytes().replace(b'"A dog."', b'"A d\xffg."'))
    write_picture(tmp_path / "train2017" / "000000000001.jpg", 1)
    found, failures = sort_out(coco_captions.annotations(tmp_path, Options()))
    assert found == []
    expected = [
        "item 1: not UTF-8",
        "item 4: caption",
        "item 5: found NoneType",
        "item 1: no caption",
        "item 2: no caption",
        "item 3: file_name",
        "item 4: images.0: Value error",
        "item 5: found str",
    ]
    for failure, part in zip(failures, expected, strict=True):
        assert f"captions_train2017.json, {part}" in failure.error


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"captions_train2014\.json"):
        list(coco_captions.annotations(tmp_path, Options(year=2014)))
    path = write(tmp_path, [image(1)], of(1, ["A dog."]))
    with pytest.raises(DataError, match="holds neither train2017 nor train2017.zip"):
        list(coco_captions.annotations(tmp_path, Options()))
    (tmp_path / "train2017").mkdir()
    path.write_text(json.dumps({"images": []}))
    with pytest.raises(DataError, match="no key 'annotations'"):
        list(coco_captions.annotations(tmp_path, Options()))


def test_what_to_download(tmp_path: Path) -> None:
    write(tmp_path, [image(9), {"id": 1}], [], "val2017")
    assert list(coco_captions.urls(tmp_path)) == [
        ("http://images.cocodataset.org/val2017/000000000009.jpg", "val2017/000000000009.jpg")
    ]
