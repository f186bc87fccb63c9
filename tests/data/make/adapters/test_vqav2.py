from pathlib import Path
from typing import Any

import pytest

from tests.data.make.adapters.published import sort_out, texts, write_json
from vlm.data.make.adapters import vqav2
from vlm.data.make.adapters.vqav2 import Options
from vlm.errors import DataError


def question(number: int, image: int, text: str) -> dict[str, Any]:
    return {"question_id": number, "image_id": image, "question": text}


def answers(number: int, best: str, *others: str) -> dict[str, Any]:
    given = [{"answer": a, "answer_id": i, "answer_confidence": "no"} for i, a in enumerate(others)]
    return {
        "question_id": number,
        "image_id": 0,
        "question_type": "what",
        "answer_type": "other",
        "multiple_choice_answer": best,
        "answers": given,
    }


def write(root: Path, questions: list[Any], annotations: list[Any], part: str = "train") -> None:
    name = f"{part}2014"
    (root / name).mkdir()
    write_json(root / f"v2_OpenEnded_mscoco_{name}_questions.json", {"questions": questions})
    write_json(root / f"v2_mscoco_{name}_annotations.json", {"annotations": annotations})


def test_questions_of_an_image_are_one_conversation(tmp_path: Path) -> None:
    asked = [question(421, 42, "What?"), question(70, 7, "Who?"), question(422, 42, "Where?")]
    known = [answers(422, "here", "here", "there"), answers(421, "a dog", "a dog")]
    known.append(answers(70, "me"))
    write(tmp_path, asked, known, "val")
    found, failures = sort_out(vqav2.annotations(tmp_path, Options(part="val")))
    assert not failures
    assert [a.images for a in found] == [
        ("val2014/COCO_val2014_000000000042.jpg",),
        ("val2014/COCO_val2014_000000000007.jpg",),
    ]
    assert texts(found[0]) == [
        ("user", "What?"),
        ("assistant", "a dog"),
        ("user", "Where?"),
        ("assistant", "here"),
    ]
    assert found[0].turns is not None and found[0].turns[1].task == "other"
    assert found[0].meta == {
        "question_ids": [421, 422],
        "answers": [["a dog"], ["here", "there"]],
    }
    assert found[0].split_key == "coco/000000000042"


def test_records_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    asked = [question(1, 1, "Good?"), question(2, 1, "Lost?"), {"question_id": 3}]
    asked.append(question(4, 2, ""))
    known = [answers(1, "yes"), answers(4, "no"), {**answers(5, "x"), "answers": [{}]}, 7]
    write(tmp_path, asked, known)
    found, failures = sort_out(vqav2.annotations(tmp_path, Options()))
    assert [texts(a) for a in found] == [[("user", "Good?"), ("assistant", "yes")]]
    expected = ["answers.0.answer", "found int", "no answers to question 2", "image_id", "image 2:"]
    for failure, part in zip(failures, expected, strict=True):
        assert part in failure.error


def test_questions_without_answers_are_a_mistake(tmp_path: Path) -> None:
    write(tmp_path, [question(1, 1, "Good?")], [answers(1, "yes")])
    (tmp_path / "v2_mscoco_train2014_annotations.json").unlink()
    with pytest.raises(DataError, match=r"holds no v2_mscoco_train2014_annotations\.json"):
        list(vqav2.annotations(tmp_path, Options()))


def test_what_to_download(tmp_path: Path) -> None:
    write(tmp_path, [question(1, 7, "a?"), question(2, 7, "b?"), {}], [], "val")
    name = "val2014/COCO_val2014_000000000007.jpg"
    assert list(vqav2.urls(tmp_path)) == [(f"http://images.cocodataset.org/{name}", name)]
