import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.data.make.adapters.published import picture, sort_out, texts, write_json
from vlm.data.make.adapters import llava
from vlm.data.make.adapters.llava import Options
from vlm.data.make.media import MediaReader
from vlm.errors import ConfigError, DataError


def record(image: Any, *values: str, **more: Any) -> dict[str, Any]:
    speakers = ("human", "gpt") * len(values)
    said = [{"from": s, "value": v} for s, v in zip(speakers, values, strict=False)]
    found = {"id": "000000033471", "conversations": said} | more
    return found if image is None else found | {"image": image}


LONG = record("000000033471.jpg", "What?\n<image>", "A bus.", "Which colour?", "Red.")


def test_instructions_with_every_turn(tmp_path: Path) -> None:
    write_json(tmp_path / "llava_instruct_150k.json", [LONG])
    (tmp_path / "train2017").mkdir()
    (found,), failures = sort_out(llava.instruct(tmp_path, Options()))
    assert not failures
    assert texts(found) == [
        ("user", "What?\n<image>"),
        ("assistant", "A bus."),
        ("user", "Which colour?"),
        ("assistant", "Red."),
    ]
    assert found.images == ("train2017/000000033471.jpg",)
    assert (found.source, found.split_key) == ("llava-instruct", "coco/000000033471")


def test_the_mixture_names_folders_and_holds_text(tmp_path: Path) -> None:
    records = [
        record("ocr_vqa/images/1.jpg", "<image>\nTitle?", "Logic"),
        record(None, "Hello", "Hi", model=""),
    ]
    write_json(tmp_path / "llava_v1_5_mix665k.json", records)
    found, _ = sort_out(llava.instruct(tmp_path, Options()))
    assert [(a.kind, a.images) for a in found] == [
        ("image", ("ocr_vqa/images/1.jpg",)),
        ("text", ()),
    ]


def test_first_answers_as_captions(tmp_path: Path) -> None:
    path = write_json(tmp_path / "any.json", [LONG, record("000000000009.jpg", "only a question")])
    (tmp_path / "train2017").mkdir()
    options = Options(annotations=path, form="caption")
    (found,), (failure,) = sort_out(llava.instruct(tmp_path, options))
    assert (found.caption, found.turns) == ("A bus.", None)
    assert failure.error == "any.json, item 2: no answer"


def test_pretraining_pairs_with_images_in_their_zip(tmp_path: Path) -> None:
    pairs = [record("00453/004539375.jpg", "Describe it.\n<image>", "olive oil")]
    write_json(tmp_path / "blip_laion_cc_sbu_558k.json", pairs)
    with pytest.raises(DataError, match=r"holds neither images nor images\.zip!"):
        list(llava.pretrain(tmp_path, Options()))
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("00453/004539375.jpg", picture(5))
    (found,), _ = sort_out(llava.pretrain(tmp_path, Options()))
    assert found.split_key == "00453/004539375.jpg"
    with MediaReader(tmp_path) as media:
        assert media.open(found.images[0]).read() == picture(5)
    (tmp_path / "images").mkdir()
    (found,), _ = sort_out(llava.pretrain(tmp_path, Options()))
    assert found.images == ("images/00453/004539375.jpg",)


def test_records_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    records = [
        record("1/a.jpg", "no answer"),
        record("1/a.jpg", "<image><image>", "two marks"),
        record(None, "<image>", "no image"),
        record("/etc/passwd", "<image>", "out"),
        record("1/../../a.jpg", "<image>", "out"),
        record(["1/a.jpg"], "<image>", "list"),
        {"id": 1, "conversations": [{"from": "bing", "value": "x"}]},
        {"id": 1},
        [],
    ]
    write_json(tmp_path / "llava_x.json", records)
    found, failures = sort_out(llava.instruct(tmp_path, Options()))
    assert found == []
    parts = ("end with assistant", "2 <image>", "1 <image>", "leads out", "leads out")
    parts += ("image", "from 'bing'", "conversations", "found list")
    for number, (failure, part) in enumerate(zip(failures, parts, strict=True), 1):
        assert failure.error.startswith(f"llava_x.json, item {number}: ")
        assert part in failure.error


def test_two_files_and_no_choice_is_a_mistake(tmp_path: Path) -> None:
    for name in ("llava_instruct_80k", "llava_instruct_150k"):
        write_json(tmp_path / f"{name}.json", [])
    with pytest.raises(ConfigError, match="say which with --annotations"):
        llava.instruct(tmp_path, Options())


def test_what_to_download(tmp_path: Path) -> None:
    write_json(tmp_path / "llava_instruct_150k.json", [LONG, record("gqa/1.jpg", "a", "b"), {}])
    name = "train2017/000000033471.jpg"
    assert list(llava.urls(tmp_path)) == [(f"http://images.cocodataset.org/{name}", name)]
