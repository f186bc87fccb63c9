"""launch/evaluate.py as a command, in this process: a fresh one spends seconds on imports."""

import contextlib
import io
import json
import logging
import os
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

from tests.evaluate.world import ask, make_run, make_sample, make_samples

SCRIPT = Path(__file__).parents[2] / "launch" / "evaluate.py"
#: what a shard may hold
HOSTILE = "[/b]\x1b[2Jx"


class Result(NamedTuple):
    code: int
    stdout: str
    stderr: str


def evaluate(*args: object) -> Result:
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", [str(SCRIPT), *map(str, args)]),
        mock.patch.dict(os.environ, {"COLUMNS": "200"}),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        pytest.raises(SystemExit) as exit,
    ):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert isinstance(exit.value.code, int)
    return Result(exit.value.code, stdout.getvalue(), stderr.getvalue())


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """The script sets logging up for its process; other tests share this one."""
    logger = logging.getLogger("vlm")
    with (
        mock.patch.object(logger, "handlers", []),
        mock.patch.object(logger, "propagate", logger.propagate),
    ):
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    odd = make_sample(5, "red", 2, ask(("Odd?", "yes", HOSTILE)))
    return make_run(tmp_path_factory.mktemp("launch"), [*make_samples(5), odd])


def test_it_prints_scores_and_where_the_report_is(run: Path) -> None:
    code, stdout, stderr = evaluate("--run", run, "--max-samples", 6)
    assert code == 0, stderr
    evaluation = json.loads((run / "eval.json").read_text())
    (row,) = [line for line in stdout.splitlines() if "colour" in line]
    scores = [evaluation["accuracy"][c]["colour"] for c in ("true", "blank", "shuffled")]
    scores.append(evaluation["prior"]["colour"])
    by_mode = evaluation["accuracy_by_mode"]
    scores += [by_mode[mode]["colour"] for mode in ("coarse_only", "autoregressive")]
    assert re.findall(r"[\d.]+", row) == [f"{score:.3f}" for score in scores] + ["5"]
    for mode, loss in evaluation["loss"].items():
        assert f"{mode} {loss:.4f}" in stdout
    assert f"coarse / fine {evaluation['loss_ratio']:.4f}" in stdout
    assert f"report: {run / 'report.html'}" in stdout


def test_names_from_shards_are_text(run: Path) -> None:
    code, stdout, stderr = evaluate("--run", run)
    assert code == 0, stderr
    assert "[/b]\\x1b[2Jx" in stdout
    assert "\x1b" not in stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-samples", "1"], "expected at least 2"),
        (["--run", "/nowhere/run"], "run /nowhere/run: no recipe.yaml there"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(run: Path, options: list[str], said: str) -> None:
    code, stdout, stderr = evaluate("--run", run, *options)
    assert code == 2 and not stdout
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert said in line
    assert "Traceback" not in stderr


def test_arguments_are_checked() -> None:
    for arguments in ([], ["--run", "x", "--max-samples", "few"], ["--what"]):
        assert evaluate(*arguments).code == 2
