"""A run folder made by hand, judged as a whole."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.ckpt.folders import seal
from tests.evaluate.world import COLOURS, make_run, make_sample, make_samples
from vlm.ckpt.save import MODEL
from vlm.errors import CheckpointError, DataError
from vlm.evaluate import judge as module
from vlm.evaluate.judge import held_out, judge, open_run
from vlm.evaluate.losses import mode_losses
from vlm.evaluate.questions import find_questions, judge_answers
from vlm.models import registry
from vlm.models.foveated import MODES

NUM_SAMPLES = 9


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judged")
    return make_run(folder, make_samples(NUM_SAMPLES))


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of its own to spoil; the shards stay where they are."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def test_it_writes_what_the_report_and_its_readers_need(run: Path) -> None:
    report = judge(run, 1000)
    assert report == run / "report.html" and report.is_file()
    evaluation = json.loads((run / "eval.json").read_text())
    assert set(evaluation["loss"]) == set(MODES)
    assert all(math.isfinite(value) for value in evaluation["loss"].values())
    ratio = evaluation["loss"]["coarse_only"] / evaluation["loss"]["coarse_fine"]
    assert evaluation["loss_ratio"] == pytest.approx(ratio)
    gap = evaluation["loss"]["autoregressive"] / evaluation["loss"]["coarse_fine"] - 1
    assert evaluation["autoregressive_gap_frac"] == pytest.approx(gap)
    assert set(evaluation["accuracy"]) == {"true", "blank", "shuffled"}
    for scores in evaluation["accuracy"].values():
        assert set(scores) == {"colour"} and 0 <= scores["colour"] <= 1
    assert evaluation["prior"] == {"colour": 1 / 3}
    assert evaluation["num_samples"] == NUM_SAMPLES
    assert evaluation["num_answers"] == {"colour": NUM_SAMPLES}
    assert evaluation["step"] == 3 and evaluation["checkpoint"].endswith("step_00000003")
    page = report.read_text()
    for text in ("world", "1,234", "5 s", "What colour is it?", "00000000"):
        assert text in page
    drawn = sorted(path.name for path in (run / "attention").iterdir())
    kinds = ("gif", "png")
    assert drawn == [f"clip_{n:02d}.{kind}" for n in range(NUM_SAMPLES) for kind in kinds]
    (run / "attention" / "clip_77.png").touch()
    judge(run, 3)
    assert len(list((run / "attention").iterdir())) == 6, "those of an earlier one are gone"


def test_its_numbers_are_those_of_the_parts(run: Path, made: Path) -> None:
    judge(run, 1000)
    evaluation = json.loads((run / "eval.json").read_text())
    recipe, _, model = open_run(run)
    collator, samples, keys = held_out(recipe, 1000)
    one_by_one = (
        collator.batch([s.frames], [collator.encode(s)], [key], "video", (16, 16))
        for s, key in zip(samples, keys, strict=True)
    )
    for mode, loss in mode_losses(model, one_by_one).items():
        assert evaluation["loss"][mode] == pytest.approx(loss, rel=1e-4)
    found = judge_answers(model, collator, samples, find_questions(samples))
    assert evaluation["accuracy"] == found.accuracy
    assert evaluation["accuracy_by_mode"] == found.accuracy_by_mode


def test_both_orders_are_judged_where_the_run_wants_them(run: Path) -> None:
    path = run / "recipe.yaml"
    recipe = json.loads(path.read_text())
    judge(run, 1000)
    frames_first = json.loads((run / "eval.json").read_text())
    looks = [path.read_bytes() for path in sorted((run / "attention").glob("*.png"))]
    assert frames_first["order"] == "frames_first" and frames_first["other_orders"] == {}
    recipe["data"]["eval_orders"] = ["question_first", "frames_first"]
    path.write_text(json.dumps(recipe))
    report = judge(run, 1000).read_text()
    evaluation = json.loads((run / "eval.json").read_text())
    assert evaluation["order"] == "question_first"
    other = evaluation["other_orders"]["frames_first"]
    for name in ("loss", "loss_ratio", "accuracy", "accuracy_by_mode"):
        assert other[name] == frames_first[name]
    judged, _, model = open_run(run)
    collator, samples, keys = held_out(judged, 1000)
    one_by_one = (
        collator.batch([s.frames], [collator.encode(s, True)], [key], "video", (16, 16))
        for s, key in zip(samples, keys, strict=True)
    )
    losses = mode_losses(model, one_by_one)
    assert evaluation["loss"] == pytest.approx(losses, rel=1e-4)
    assert evaluation["loss"]["coarse_fine"] != pytest.approx(other["loss"]["coarse_fine"])
    assert "question first" in report and "frames first" in report
    # a question that is read first changes where all but a clip's first frame are looked at
    asked = [path.read_bytes() for path in sorted((run / "attention").glob("*.png"))]
    several = [len(loaded.frames) > 1 for loaded in samples]
    assert [one != other for one, other in zip(looks, asked, strict=True)] == several


def test_a_run_that_trained_in_one_mode_is_judged_in_it(run: Path) -> None:
    path = run / "recipe.yaml"
    judge(run, 1000)
    own = json.loads((run / "eval.json").read_text())
    path.write_text(
        json.dumps(
            json.loads(path.read_text()) | {"train": {"steps": 3, "modes": {"coarse_only": 1}}}
        )
    )
    page = judge(run, 1000).read_text()
    found = json.loads((run / "eval.json").read_text())
    assert list(own["accuracy_by_mode"]) == ["coarse_fine", "coarse_only", "autoregressive"]
    assert list(found["accuracy_by_mode"]) == ["coarse_only", "autoregressive"]
    assert found["accuracy"]["true"] == own["accuracy_by_mode"]["coarse_only"]
    assert found["loss"] == own["loss"], "losses are always those of all modes"
    (width, height) = Image.open(run / "attention" / "clip_00.png").size
    assert height == 14 + 2 * (128 + 4), "frames and the static query's look"
    assert page.count('class="heat"') == sum(1 + i % 4 for i in range(NUM_SAMPLES)), "of each frame"


def test_held_out_samples_are_drawn_from_all_of_them(run: Path) -> None:
    recipe, _, _ = open_run(run)
    _, samples, keys = held_out(recipe, 1000)
    assert sorted(keys) == [f"{i:08d}" for i in range(NUM_SAMPLES)]
    assert [s.row for s in samples] == [int(key) for key in keys]
    _, _, fewer = held_out(recipe, 4)
    assert fewer == keys[:4], "always the same ones"
    _, _, others = held_out(recipe.model_copy(update={"seed": 1}), 1000)
    assert others != keys and sorted(others) == sorted(keys)
    for loaded in samples:
        colour = loaded.sample.conversation()[1].content
        assert abs(loaded.frames.mean((0, 1, 2)) - COLOURS[colour]).max() < 4


def test_few_clips_are_shown_from_the_whole_range(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "NUM_CLIPS", 3)
    judge(run, 1000)
    recipe, _, _ = open_run(run)
    _, samples, _ = held_out(recipe, 1000)
    shown = [np.asarray(Image.open(p)) for p in sorted((run / "attention").glob("*.png"))]
    assert len(shown) == 3
    for picture, loaded in zip(shown, samples[::3], strict=True):
        assert picture.shape[1] == 44 + (128 + 4) * len(loaded.frames)
        assert np.abs(picture[20, 50].astype(int) - loaded.frames[0, 8, 8]).max() < 3


def test_text_samples_are_not_judged_and_no_task_is_no_fault(tmp_path: Path) -> None:
    turns = [
        t.model_copy(update={"task": None}) for t in make_sample(0, "red", 1).sample.conversation()
    ]
    samples = [make_sample(i, "blue", 2, turns) for i in range(3)]
    run = make_run(tmp_path, samples)
    judge(run, 1000)
    evaluation = json.loads((run / "eval.json").read_text())
    assert evaluation["num_samples"] == 3
    assert evaluation["accuracy"] == {"true": {}, "blank": {}, "shuffled": {}}
    assert evaluation["prior"] == evaluation["num_answers"] == {}


def test_samples_are_batched_within_bounds(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In as many batches as samples the losses stay what they are."""
    judge(run, 1000)
    whole = json.loads((run / "eval.json").read_text())
    monkeypatch.setattr(module, "SAMPLES_PER_BATCH", 1)
    monkeypatch.setattr("vlm.evaluate.questions.PIXELS_PER_BATCH", 1)
    judge(run, 1000)
    single = json.loads((run / "eval.json").read_text())
    assert single["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    assert single["accuracy"] == whole["accuracy"]


# --- what goes wrong --------------------------------------------------------------------------


def test_no_run_and_no_checkpoint(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no recipe\.yaml there"):
        judge(tmp_path / "nowhere", 10)
    (run / "metrics.jsonl").rename(run / "gone")
    with pytest.raises(CheckpointError, match="metrics"):
        judge(run, 10)
    (run / "gone").rename(run / "metrics.jsonl")
    (run / "checkpoints" / "step_00000003" / "COMPLETE").unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        judge(run, 10)
    assert not (run / "eval.json").exists() and not (run / "report.html").exists()


@pytest.mark.parametrize("count", [1, 0, -3])
def test_one_sample_is_too_few(run: Path, count: int) -> None:
    with pytest.raises(DataError, match=rf"--max-samples is {count}\).*at least 2"):
        judge(run, count)


def test_a_model_that_has_diverged_is_not_judged(run: Path) -> None:
    checkpoint = run / "checkpoints" / "step_00000003"
    model = registry.load(checkpoint / MODEL)
    with torch.no_grad():
        model.connector.q_init.weight.fill_(np.nan)
    model.save_pretrained(checkpoint / MODEL)
    seal(checkpoint)
    with pytest.raises(CheckpointError, match="step_00000003: its held-out loss is .*nan"):
        judge(run, 10)
    assert not (run / "eval.json").exists()


def test_another_tokenizer_than_the_manifest_s(run: Path) -> None:
    checkpoint = run / "checkpoints" / "step_00000003"
    path = checkpoint / MODEL / "chat_template.jinja"
    path.write_text(path.read_text() + " ")
    seal(checkpoint)
    with pytest.raises(DataError, match="counted with another tokenizer"):
        judge(run, 10)
