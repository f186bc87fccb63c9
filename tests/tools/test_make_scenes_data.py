"""The words of each image against its pixels, and the recipes that use it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tools.run_tool import run_tool
from vlm import config
from vlm.data.make.shapes import COLOURS
from vlm.data.text import chat

RECIPES = Path(__file__).parents[2] / "recipes" / "scenes"


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    result = run_tool(
        "make_scenes_data", "--output", folder, "--images", 60, "--eval-images", 12, "--seed", 3
    )
    assert result.returncode == 0, result.stderr
    return folder


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_captions_say_what_is_seen(output: Path) -> None:
    for record in records(output / "captions_train.jsonl"):
        pixels = np.asarray(Image.open(output / record["images"][0]), float)
        assert pixels.shape == (32, 40, 3)
        colour, place = record["caption"].split()[1], record["caption"].split(" at the ")[1]
        near = np.linalg.norm(pixels - np.array(COLOURS[colour], float), axis=-1) < 40
        y, x = (float(found.mean()) for found in near.nonzero())
        assert place == f"{'top' if y < 15.5 else 'bottom'} {'left' if x < 19.5 else 'right'}"


def test_a_question_is_one_of_three_and_answered_by_the_caption(output: Path) -> None:
    captions = {r["id"]: r["caption"] for r in records(output / "captions_eval.jsonl")}
    found = records(output / "questions_eval.jsonl")
    assert {r["id"] for r in found} == set(captions)
    for record in found:
        question, answer = record["turns"]
        assert answer["content"].removeprefix("a ") in captions[record["id"]]
    tasks = {r["turns"][1]["task"] for r in records(output / "questions_train.jsonl")}
    assert tasks == {"colour", "shape", "place"}


def test_texts_are_answered_by_what_they_say(output: Path) -> None:
    for record in records(output / "texts_train.jsonl"):
        question, answer = (turn["content"] for turn in record["turns"])
        said = set(question.replace("?", " ").split())
        assert set(answer.split()) - {"a", "at", "the"} <= said


def test_the_splits_share_no_image(output: Path) -> None:
    pictures = [
        (output / "images" / f"{split}-00000.png").read_bytes() for split in ("train", "eval")
    ]
    assert pictures[0] != pictures[1]
    chat.load_tokenizer(output / "tokenizer", "<|image|>")


def test_the_recipes_follow_each_other() -> None:
    found = {path.stem: config.load(path) for path in RECIPES.glob("*.yaml")}
    assert set(found) == {"language", "perceiver_stage1", "perceiver_stage2", "prefix"}
    stage1, stage2 = found["perceiver_stage1"], found["perceiver_stage2"]
    assert stage2.model.init_from == stage1.output_dir
    assert stage1.model.freeze == {"vision": None, "language": None}
    assert stage2.model.freeze == {"vision": None} and stage2.model.language.lora is not None
    pretrained = {one.model.language.pretrained for one in (stage1, stage2, found["prefix"])}
    assert pretrained == {"data/scenes/language"}
    assert stage1.model.vision.pretrained == stage2.model.vision.pretrained == "data/scenes/tower"
