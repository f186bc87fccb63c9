import re
from pathlib import Path

import pytest
import yaml

from tests.data import helpers
from tests.tools.run_tool import error_line, run_tool
from vlm.data.text.tokenizer import train_tokenizer

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["What colour is the circle? red"] * 9, path, 300, "<|image|>")
    return path


def test_a_terminal_shows_text_mask_and_frames(tmp_path: Path, tokenizer: Path) -> None:
    helpers.write_shards(tmp_path, [3, 0, 1, 1])
    result = run_tool("show_samples", tmp_path, "--tokenizer", tokenizer)
    assert result.returncode == 0, result.stderr
    assert "test, video, turns, 3 frames of 16x16" in result.stdout
    assert "[3 frame tokens]<|user|>What colour is the circle?<|end|>" in result.stdout
    assert "<|assistant|>\u27e6red<|end|>\u27e7" in result.stdout
    assert result.stdout.count("text tokens") == 3, "three samples unless told otherwise"


def test_a_recipe_says_how_the_model_sees(tmp_path: Path, tokenizer: Path) -> None:
    helpers.write_shards(tmp_path / "in", [2])
    tree = yaml.safe_load(RECIPE.read_text())
    tree["model"]["tokenizer"] = str(tokenizer)
    tree["data"]["loss_on"] = "all"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    result = run_tool("show_samples", tmp_path / "in", "--recipe", recipe)
    assert result.returncode == 0, result.stderr
    assert "\u27e6<|user|>What" in result.stdout, "every text token is learned"


def test_hostile_text_does_not_reach_the_terminal(tmp_path: Path, tokenizer: Path) -> None:
    sample = helpers.make_sample(0, 0).model_copy(update={"source": "\x1b[2J"})
    raw = sample.to_json().replace(b"red", b"\\u001b]0;x\\u0007 [bold]red")
    helpers.write_tar(tmp_path / "a.tar", [("a.json", raw), ("b.json", b'{"version": "\x7f"}')])
    result = run_tool("show_samples", tmp_path, "--tokenizer", tokenizer)
    assert result.returncode == 0, result.stderr
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", result.stdout)
    assert "[bold]red" in result.stdout, "no markup"
    assert "cannot be used" in result.stdout


def test_a_page_of_chosen_samples(tmp_path: Path, tokenizer: Path) -> None:
    helpers.write_shards(tmp_path / "in", [1] * 30)
    page = tmp_path / "page.html"
    shared = (tmp_path / "in", "--tokenizer", tokenizer, "--html", page)
    assert "24 samples" in run_tool("show_samples", *shared, "--seed", 1).stdout
    assert page.read_text().count("<article") == 24
    assert "1 samples" in run_tool("show_samples", *shared, "--key", "00000029").stdout


def test_mistakes_are_one_line(tmp_path: Path, tokenizer: Path) -> None:
    helpers.write_shards(tmp_path, [1])
    result = run_tool("show_samples", tmp_path, "--tokenizer", tokenizer, "--key", "none")
    assert "no sample is left" in error_line(result)
    assert run_tool("show_samples", tmp_path).returncode == 2
    result = run_tool("show_samples", tmp_path, "--tokenizer", tmp_path / "none")
    assert "no such folder" in error_line(result)
