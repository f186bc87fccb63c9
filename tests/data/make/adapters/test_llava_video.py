import json
from pathlib import Path

import pytest

from tests.data.make.adapters.clip_sets import collect, write, write_json_lines, write_tar
from vlm.data.make.adapters import llava_video
from vlm.data.make.adapters.llava_video import Options
from vlm.errors import ConfigError, DataError

FOLDER = "0_30_s_academic_v0_1"


def record(video: str, *values: str) -> dict[str, object]:
    speakers = ("human", "gpt")
    talk = [{"from": speakers[i % 2], "value": value} for i, value in enumerate(values)]
    return {"id": f"id-{video}", "video": video, "data_source": FOLDER, "conversations": talk}


def test_every_turn_with_one_place_for_the_video(tmp_path: Path) -> None:
    write(tmp_path / FOLDER / "academic_source" / "Charades" / "a.mp4", "")
    path = "academic_source/Charades/a.mp4"
    write(
        tmp_path / FOLDER / f"{FOLDER}_cap_processed.json",
        json.dumps([record(path, "<image>\nDescribe it.", "A cat."), record("b.mp4", "Q", "A")]),
    )
    asked = ("First?", "One.", "Look <image> again <image>?", "Two.")
    name = "0_30_s_academic_mc_v0_1_qa_processed.json"
    write(tmp_path / FOLDER / name, json.dumps([record(path, *asked)]))
    found, failures = collect(llava_video.llava_video, tmp_path, Options())
    choices, caption = found
    assert caption.video == choices.video == f"{FOLDER}/{path}"
    assert caption.source == f"llava-video/{FOLDER}"
    assert caption.turns is not None and choices.turns is not None
    assert [(t.role, t.content, t.task) for t in caption.turns] == [
        ("user", "<video>\nDescribe it.", None),
        ("assistant", "A cat.", "caption"),
    ]
    assert [t.content for t in choices.turns] == ["First?", "One.", "Look <video> again ?", "Two."]
    assert choices.turns[1].task == "multi_choice"
    assert caption.split_key == choices.split_key == "a"
    assert [f.reason for f in failures] == ["no such video"]


def test_some_configurations(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write(tmp_path / folder / "a_oe_.json", json.dumps([record("a.mp4", "Q", "A")]))
        write(tmp_path / folder / "a.mp4", "")
    found, _ = collect(llava_video.llava_video, tmp_path, Options(configs=("two",)))
    assert [a.video for a in found] == ["two/a.mp4"]
    with pytest.raises(ConfigError, match="configs three: no such folder"):
        collect(llava_video.llava_video, tmp_path, Options(configs=("three",)))


def test_vista_in_tars(tmp_path: Path) -> None:
    write_tar(tmp_path / "two_needle_niah_qa" / "two_needle_niah_qa_0.tar", {"x1.mp4": b""})
    write_tar(tmp_path / "other_qa" / "other_qa_0.tar", {"x1.mp4": b""})
    write_json_lines(
        tmp_path / "two_needle_niah_qa" / "two_needle_niah_qa.jsonl", record("x1", "<video>Q", "A")
    )
    (found,), failures = collect(llava_video.vista, tmp_path, Options())
    assert found.video == "two_needle_niah_qa/two_needle_niah_qa_0.tar!x1.mp4"
    assert found.source == "vista/two_needle_niah_qa"
    assert found.turns is not None and found.turns[0].content == "<video>Q"
    assert not failures


def test_conversations_that_are_none(tmp_path: Path) -> None:
    write(tmp_path / "one" / "a.mp4", "")
    good = record("a.mp4", "Q", "A")
    faulty = [
        {"id": 1},
        good | {"conversations": [{"from": "alien", "value": "x"}]},
        record("a.mp4", "Q"),
        record("a.mp4", "<image>", "A"),
        record("a.mp4", "Q", " "),
        5,
    ]
    write(tmp_path / "one" / "a.json", json.dumps(faulty))
    found, failures = collect(llava_video.vista, tmp_path, Options())
    assert not found
    assert [f.reason for f in failures] == [*["bad record"] * 5, "unreadable record"]


def test_the_data_set_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no"):
        collect(llava_video.vista, tmp_path, Options())
