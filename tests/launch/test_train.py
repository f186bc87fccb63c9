"""The command itself: the real one where processes matter, else in a rank that is already up."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

from tests.distributed import ranks
from tests.ports import free_port
from tests.train import helpers, runs
from vlm.data.text.tokenizer import train_tokenizer
from vlm.train.metrics import read_rows

SCRIPT = helpers.ROOT / "launch/train.py"


class Result(NamedTuple):
    code: int
    stdout: str
    stderr: str


def arguments(*more: str, recipe: Path | None = None) -> list[str]:
    recipe = recipe or helpers.world() / "recipe.yaml"
    return ["--ds_config", str(helpers.ds_file(2)), "--recipe", str(recipe), *more]


def run(command: Sequence[str], **variables: str) -> Result:
    """A real process, without what a launcher would have set."""
    hidden = {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"}
    environment = {k: v for k, v in os.environ.items() if k not in hidden} | variables
    done = subprocess.run(
        command, cwd=helpers.ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    return Result(done.returncode, done.stdout, done.stderr)


def run_here(argv: list[str], variables: dict[str, str]) -> Result:
    """On a rank: the script as ``python launch/train.py`` runs it, with all that it writes."""
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            with (
                mock.patch.object(sys, "argv", [str(SCRIPT), *argv]),
                mock.patch.dict(os.environ, variables),
            ):
                runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
        out.seek(0)
        err.seek(0)
        return Result(code, out.read(), err.read())


def mistake(argv: list[str], **variables: str) -> str:
    """The one line that a user's mistake ends with."""
    (result,) = ranks(1).run(run_here, argv, variables)
    return error_line(result)


def error_line(result: Result) -> str:
    assert result.code == 2, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


def deepspeed(*argv: str) -> Result:
    launcher = Path(sys.executable).with_name("deepspeed")
    port = str(free_port())
    return run([str(launcher), "--num_gpus", "2", "--master_port", port, str(SCRIPT), *argv])


def test_two_ranks_by_the_deepspeed_launcher() -> None:
    folder = runs.new_folder() / "run"
    done = deepspeed(*arguments(f"output_dir={folder}", "train.steps=4", "train.log_every=2"))
    assert done.code == 0, done.stderr
    assert (folder / "checkpoints/latest").read_text() == "step_00000004"
    assert json.loads((folder / "ds_config.json").read_text())["train_batch_size"] == 4
    rows = read_rows(folder / "metrics.jsonl")
    found = [(row["event"], row["step"]) for row in rows]
    events = [("train", 2), ("eval", 3), ("checkpoint", 3), ("train", 4)]
    assert found == [*events, ("eval", 4), ("checkpoint", 4)]
    assert "Warning" not in done.stderr
    assert len(done.stderr.splitlines()) < 10  # what a person can read


def test_the_launcher_passes_the_exit_code_on() -> None:
    done = deepspeed(*arguments(recipe=Path("recipes/nowhere.yaml")))
    assert done.code == 2
    (line,) = done.stderr.splitlines()  # of two ranks
    assert line.startswith("error: recipe recipes/nowhere.yaml: ")


def test_one_process_without_a_launcher() -> None:
    """On a machine that sets WORLD_SIZE for whoever may ask; then a recipe that has changed."""
    folder = runs.new_folder() / "run"
    argv = arguments(f"output_dir={folder}", "train.steps=2")
    done = run([sys.executable, str(SCRIPT), *argv], WORLD_SIZE="16")
    assert done.code == 0, done.stderr
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["event"] == "train"]
    assert [row["step"] for row in rows] == [1, 2]
    stale = mistake([*argv, "optim.lr.language=1e-5"])
    assert "optim.lr.language was 0.003 and is now 1e-05" in stale
    assert "choose another output_dir" in stale


def test_overrides_may_stand_anywhere_and_a_dry_run_writes_nothing() -> None:
    folder = runs.new_folder() / "run"
    argv = [f"output_dir={folder}", *arguments("--dry-run", "train.steps=77", "seed=3")]
    (done,) = ranks(1).run(run_here, argv, {})
    assert done.code == 0, done.stderr
    assert done.stderr == ""
    assert "steps: 77" in done.stdout and "seed: 3" in done.stdout
    assert "Parameters" in done.stdout and "First micro-batch" in done.stdout
    assert not folder.exists()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["train.stepz=3"], "train.stepz: unknown key; did you mean steps?"),
        (["train.steps=-3"], "train.steps: "),
        (["train.steps"], "expected a.b=value"),
        (["data.train=nowhere.parquet"], "manifest nowhere.parquet: no such file"),
        (["data.eval=nowhere.parquet"], "manifest nowhere.parquet: no such file"),
        (["model.tokenizer=nowhere"], "tokenizer nowhere: no such folder"),
        (["model.family=foveatd"], "foveatd"),
        (["model.freeze=[vision,connector,language]"], "names every component"),
        (["data.budget=20"], "data.budget"),
    ],
)
def test_a_mistake_in_the_recipe_is_one_line(argv: list[str], expected: str) -> None:
    folder = runs.new_folder() / "run"
    assert expected in mistake(arguments(f"output_dir={folder}", *argv))
    assert not (folder / "metrics.jsonl").exists()


def test_files_that_are_not_there() -> None:
    missing = mistake(arguments(recipe=Path("nowhere.yaml")))
    assert "recipe nowhere.yaml: No such file" in missing
    argv = arguments()
    argv[1] = "nowhere.json"
    assert "DeepSpeed file nowhere.json: No such file" in mistake(argv)


def test_a_number_of_ranks_that_does_not_share_the_micro_batches() -> None:
    line = mistake(arguments(), RANK="0", WORLD_SIZE="3")
    assert "data.micro_batches is 4, which 3 ranks cannot share equally" in line
    assert "start 1 or 2 or 4 ranks" in line


def test_shards_that_are_gone_or_changed(tmp_path: Path) -> None:
    shutil.copytree(helpers.world() / "shards", tmp_path / "shards")
    shutil.copy(helpers.world() / "train.parquet", tmp_path)
    argv = arguments(f"output_dir={tmp_path}/run", f"data.train={tmp_path}/train.parquet")
    shard = tmp_path / "shards/train-00000.tar"
    os.truncate(shard, shard.stat().st_size - 512)
    assert re.search(r"train-00000.tar has \d+ bytes, expected \d+", mistake(argv))
    shard.unlink()
    assert "train-00000.tar is missing" in mistake(argv)


@pytest.mark.parametrize("num_flipped", [1, 99])
def test_flipped_bytes_are_named_and_many_of_them_stop_the_run(
    num_flipped: int, tmp_path: Path
) -> None:
    """Sizes are right, so only reading finds them; each names shard, byte and sample."""
    shutil.copytree(helpers.world() / "shards", tmp_path / "shards")
    shutil.copy(helpers.world() / "train.parquet", tmp_path)
    shard = tmp_path / "shards/train-00000.tar"
    content, at = bytearray(shard.read_bytes()), 0
    for _ in range(num_flipped):
        if (at := content.find(b"\xff\xd8", at + 1)) < 0:
            break
        content[at + 400] ^= 255
    shard.write_bytes(content)
    argv = arguments(f"output_dir={tmp_path}/run", f"data.train={tmp_path}/train.parquet")
    (result,) = ranks(1).run(run_here, argv, {})
    named = [json.loads(line) for line in (tmp_path / "run/bad_samples.jsonl").open()]
    assert all("train-00000.tar" in str(bad) and "byte" in str(bad) for bad in named)
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    if num_flipped == 1:
        assert (result.code, errors, len(named)) == (0, [], 1)
    else:
        assert result.code == 2 and "data.max_bad_frac" in errors[0] and len(named) > 8


def test_another_tokenizer_than_the_manifest_was_built_with(tmp_path: Path) -> None:
    train_tokenizer(["entirely other words"] * 9, tmp_path / "t", 290, helpers.IMAGE_TOKEN)
    argv = arguments(f"output_dir={tmp_path}/run", f"model.tokenizer={tmp_path}/t")
    assert "counted with another tokenizer" in mistake(argv)
