"""A small run: videos that decode, answers that their frames still show, nothing shared."""

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tests.tools.run_tool import run_tool
from vlm.data.format.frames import extract_frames
from vlm.data.make import annotations, shapes
from vlm.data.text import chat

NUM_TRAIN, NUM_EVAL = 12, 6


def make(output: Path, *options: object) -> Path:
    result = run_tool(
        "make_quickstart_data", "--output", output, "--clips", NUM_TRAIN, "--eval-clips", NUM_EVAL,
        "--workers", 1, *options,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return output


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("quickstart") / "data")


def lines(made: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (made / f"{split}.jsonl").read_text().splitlines()]


def test_videos_are_h264_of_the_length_they_claim(made: Path) -> None:
    for split, count in (("train", NUM_TRAIN), ("eval", NUM_EVAL)):
        clips = [line for line in lines(made, split) if "video" in line]
        assert len(clips) == count
        for line in clips:
            with av.open(str(made / line["video"])) as container:
                stream = container.streams.video[0]
                assert stream.codec_context.name == "h264"
                assert (stream.width, stream.height) == (shapes.WIDTH, shapes.HEIGHT)
                decoded = sum(1 for _ in container.decode(stream))
            assert decoded == line["meta"]["duration_s"] * shapes.FPS


def test_precompute_takes_the_annotations(made: Path) -> None:
    for split, count in (("train", NUM_TRAIN), ("eval", NUM_EVAL)):
        path = made / f"{split}.jsonl"
        found = annotations.index(path)
        with path.open("rb") as file:
            assert len(list(annotations.read(file, found["video"]))) == count
        assert bool(len(found["text"])) == (split == "train"), "text teaches, it is not measured"


def test_what_precompute_makes_of_a_clip_still_shows_the_answers(made: Path) -> None:
    """After compression and the crop to a square: places of the one shape there is."""
    checked = 0
    for line in lines(made, "train") + lines(made, "eval"):
        if "video" not in line or line["meta"]["group"] == "two shapes":
            continue
        frames = np.stack(extract_frames(made / line["video"], size=32, fps=1))
        assert len(frames) == line["meta"]["duration_s"]
        for asked, told in zip(line["turns"][::2], line["turns"][1::2], strict=True):
            if told.get("task") != "position":
                continue
            frame = frames[0 if "start" in asked["content"] else -1].astype(float)
            background = np.median(frame.reshape(-1, 3), axis=0)
            far = np.linalg.norm(frame - background, axis=-1)
            rows, columns = np.nonzero(far > far.max() / 2)
            place = "top" if rows.mean() < 15.5 else "bottom"
            place += " left" if columns.mean() < 15.5 else " right"
            assert told["content"] == place
            checked += 1
    assert checked > 5


def test_the_tokenizer_reads_every_conversation(made: Path) -> None:
    tokenizer = chat.load_tokenizer(made / "tokenizer", "<|image|>")
    for line in lines(made, "train") + lines(made, "eval"):
        for turn in line["turns"]:
            ids = tokenizer(turn["content"], add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(ids) == turn["content"]


def test_the_same_seed_gives_the_same_data(made: Path, tmp_path: Path) -> None:
    again = make(tmp_path / "again", "--workers", 2)
    for path in (p for p in made.rglob("*") if p.is_file()):
        assert (again / path.relative_to(made)).read_bytes() == path.read_bytes(), path.name
    other = make(tmp_path / "other", "--seed", 1)
    assert (other / "train.jsonl").read_bytes() != (made / "train.jsonl").read_bytes()


def test_no_clip_is_in_both_splits(made: Path) -> None:
    train, held_out = lines(made, "train"), lines(made, "eval")
    assert not {line["id"] for line in train} & {line["id"] for line in held_out}
    videos = {(made / line["video"]).read_bytes() for line in train if "video" in line}
    assert len(videos) == NUM_TRAIN
    assert not videos & {(made / line["video"]).read_bytes() for line in held_out}


def test_a_board_is_another_scene(tmp_path: Path) -> None:
    made = make(tmp_path / "board", "--scene", "board")
    clips = [line for line in lines(made, "train") if "video" in line]
    assert len(clips) == NUM_TRAIN
    for line in clips:
        assert line["turns"][0]["content"].startswith("What colour is field ")
        (first, second) = extract_frames(made / line["video"], size=48, fps=1)
        assert first.shape == (48, 48, 3)
        assert np.abs(first.astype(int) - second).mean() < 3, "nothing moves"


@pytest.mark.parametrize("option", ["--clips", "--eval-clips", "--workers"])
def test_none_of_what_needs_some(tmp_path: Path, option: str) -> None:
    result = run_tool("make_quickstart_data", "--output", tmp_path / "data", option, 0)
    assert result.returncode == 2
    assert f"{option}: found '0', expected a whole number above 0" in result.stderr
    assert not (tmp_path / "data").exists()
