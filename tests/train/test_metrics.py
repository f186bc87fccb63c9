import csv
import json
import logging
import math
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.waiting import wait_for
from vlm import dist
from vlm.config_train import LogConfig
from vlm.errors import CheckpointError
from vlm.train.health import Alert
from vlm.train.metrics import COLUMNS, MetricLog, read_rows

FILES_ONLY = LogConfig(wandb="disabled")
OFFLINE = LogConfig(wandb="offline")


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def strict_rows(run_dir: Path) -> list[dict]:
    """metrics.jsonl as a reader that knows no NaN sees it."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    text = (run_dir / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def csv_rows(run_dir: Path) -> list[dict]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def write_steps(run_dir: Path, steps: range, resume_step: int | None = None) -> None:
    with MetricLog(run_dir, FILES_ONLY, {}, resume_step) as metrics:
        for step in steps:
            metrics.log(step, {"event": "train", "loss": 1 / step})


def test_both_files_hold_the_same_rows_at_once(tmp_path: Path) -> None:
    metrics = MetricLog(tmp_path / "run", FILES_ONLY, {})
    metrics.log(10, {"event": "train", "loss": 0.1 + 0.2, "tokens_seen": 12345678901})
    metrics.log(10, {"event": "eval", "eval_loss": 1e-7})
    # Not closed yet: a run that is killed now has lost nothing.
    rows = strict_rows(tmp_path / "run")
    metrics.close()
    assert [list(row) for row in rows] == [list(COLUMNS)] * 2
    assert rows[0]["loss"] == 0.1 + 0.2
    assert rows[0]["eval_loss"] is None
    assert rows[1]["step"] == 10
    as_text = [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows]
    assert csv_rows(tmp_path / "run") == as_text


def test_what_is_not_a_number_stays_readable(tmp_path: Path) -> None:
    with MetricLog(tmp_path, FILES_ONLY, {}) as metrics:
        metrics.log(1, {"event": "train", "loss": math.nan, "grad_norm": math.inf})
    assert strict_rows(tmp_path)[0]["loss"] == "nan"
    assert math.isnan(float(csv_rows(tmp_path)[0]["loss"]))
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert math.isnan(row["loss"])
    assert row["grad_norm"] == math.inf
    assert row["event"] == "train"


@pytest.mark.parametrize(
    "values", [{"event": "train", "los": 1.0}, {"event": "train", "step": 3}, {"event": "tain"}]
)
def test_a_wrong_column_is_our_bug(tmp_path: Path, values: dict) -> None:
    with MetricLog(tmp_path, FILES_ONLY, {}) as metrics, pytest.raises(AssertionError):
        metrics.log(1, values)
    assert strict_rows(tmp_path) == []


def test_resume_drops_what_the_checkpoint_does_not_know(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 8))
    write_steps(tmp_path, range(5, 10), resume_step=4)
    assert [row["step"] for row in strict_rows(tmp_path)] == list(range(1, 10))
    assert [row["step"] for row in csv_rows(tmp_path)] == [str(n) for n in range(1, 10)]
    assert [row["loss"] for row in strict_rows(tmp_path)] == [1 / n for n in range(1, 10)]


def test_a_new_run_starts_anew(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 8))
    write_steps(tmp_path, range(1, 3))
    assert [row["step"] for row in strict_rows(tmp_path)] == [1, 2]
    assert len(csv_rows(tmp_path)) == 2


@pytest.mark.parametrize("cut", [1, 7, 60])
def test_a_line_cut_by_a_kill_is_dropped(tmp_path: Path, cut: int) -> None:
    write_steps(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    write_steps(tmp_path, range(3, 5), resume_step=3)
    assert [row["step"] for row in strict_rows(tmp_path)] == [1, 2, 3, 4]
    assert [row["step"] for row in csv_rows(tmp_path)] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("line", ["{", "[1]", "null", '{"loss": 1}', '{"step": null}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    write_steps(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, lines[2], ""]))
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl line 2: found .* expected"):
        MetricLog(tmp_path, FILES_ONLY, {}, resume_step=3)
    assert path.read_bytes() == before


def test_no_metrics_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_rows(tmp_path / "metrics.jsonl")


def test_a_kill_while_resuming_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_steps(tmp_path, range(1, 4))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(source: object, target: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        MetricLog(tmp_path, FILES_ONLY, {}, resume_step=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "rank", lambda: 1)
    with MetricLog(tmp_path / "run", OFFLINE, {}) as metrics:
        metrics.log(1, {"event": "train"})
    assert not (tmp_path / "run").exists()


def tensorboard_steps(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_shows_the_same_numbers(tmp_path: Path) -> None:
    config = LogConfig(wandb="disabled", tensorboard=True)
    with MetricLog(tmp_path, config, {}) as metrics:
        for step in (1, 2, 3):
            metrics.log(step, {"event": "train", "loss": step / 4})
    with MetricLog(tmp_path, config, {}, resume_step=1) as metrics:
        metrics.log(2, {"event": "train", "loss": 8.0})
        metrics.log(2, {"event": "eval", "eval_loss": 9.0})
    assert tensorboard_steps(tmp_path, "train/loss") == [(1, 0.25), (2, 8.0)]
    assert tensorboard_steps(tmp_path, "eval/eval_loss") == [(2, 9.0)]


def wait_until_written(text: bytes, paths: Iterable[Path]) -> None:
    """In any of them: W&B's own process writes on when the run has ended here."""
    files = list(paths)
    wait_for(lambda: any(text in file.read_bytes() for file in files))


def test_wandb_offline_keeps_its_run_over_a_resume(tmp_path: Path) -> None:
    for step, resume_step in ((1, None), (2, 1)):
        with MetricLog(tmp_path, OFFLINE, {"seed": 7}, resume_step) as metrics:
            metrics.log(step, {"event": "train", "loss": 0.5})
    run_id = (tmp_path / "wandb_run_id").read_text()
    files = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert files and {file.name for file in files} == {f"run-{run_id}.wandb"}
    wait_until_written(b"train/loss", files)


class Failing:
    """Stands in for the wandb module; breaks at ``where``."""

    def __init__(self, where: str, error: Exception) -> None:
        self.where, self.error = where, error
        self.calls: list[str] = []

    def __call__(self, *args: object, **kwargs: object) -> "Failing":
        return self

    def __getattr__(self, name: str) -> "Failing":
        self.calls.append(name)
        if name == self.where:
            raise self.error
        return self


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_broken_wandb_costs_one_warning(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: str,
) -> None:
    key = "f00d" * 10
    monkeypatch.setenv("WANDB_API_KEY", key)
    fake = Failing(where, RuntimeError(f"no route with key {key}\nsecond line"))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with caplog.at_level(logging.WARNING), MetricLog(tmp_path, OFFLINE, {}) as metrics:
        for step in (1, 2, 3):
            metrics.log(step, {"event": "train", "loss": 0.5})
    assert len(strict_rows(tmp_path)) == 3
    (record,) = caplog.records
    assert "no route with key *** second line" in record.getMessage()
    assert key not in caplog.text
    assert fake.calls.count(where) == 1


@pytest.mark.parametrize(
    ("config", "module", "num_warnings"),
    [
        (OFFLINE, "wandb", 1),
        (FILES_ONLY, "wandb", 0),
        (LogConfig(wandb="disabled", tensorboard=True), "torch.utils.tensorboard", 1),
    ],
)
def test_an_absent_package_matters_only_if_wanted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    config: LogConfig,
    module: str,
    num_warnings: int,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with caplog.at_level(logging.WARNING), MetricLog(tmp_path, config, {}) as metrics:
        metrics.log(1, {"event": "train", "loss": 0.5})
    assert len(caplog.records) == num_warnings
    assert len(strict_rows(tmp_path)) == 1


def test_wandb_does_not_ask_a_terminal_for_a_key(tmp_path: Path) -> None:
    """A question that nobody reads would hold up every rank."""
    script = (
        "from pathlib import Path; from vlm.config_train import LogConfig; from vlm import log\n"
        "from vlm.train.metrics import MetricLog\n"
        "log.setup()\n"
        "with MetricLog(Path('run'), LogConfig(wandb='online'), {}) as m: "
        "m.log(1, {'event': 'train'})\n"
    )
    source = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": str(source), "WANDB_MODE": "online", "HOME": str(tmp_path)}
    ours, theirs = pty.openpty()
    try:
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            env=env,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            timeout=300,
            check=True,
        )
        shown = os.read(ours, 100_000).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert re.search(r"W&B is off for this run, .*: UsageError: No API key", shown), shown
    assert len(strict_rows(tmp_path / "run")) == 1


ALERT = Alert(2, "loss_spike", "warning", "the loss is 9")


def test_a_run_that_goes_back_drops_its_rows_and_draws_anew(tmp_path: Path) -> None:
    config = LogConfig(wandb="disabled", tensorboard=True)
    with MetricLog(tmp_path, config, {}, more_columns=["loss_source_a"]) as metrics:
        for step in (1, 2, 3):
            metrics.log(step, {"event": "train", "loss": 9.0, "loss_source_a": 1.0})
        metrics.alert(ALERT)
        metrics.rewind(1)
        metrics.log(3, {"event": "train", "loss": 8.0})
    assert [(row["step"], row["loss"]) for row in strict_rows(tmp_path)] == [(1, 9.0), (3, 8.0)]
    assert [row["loss_source_a"] for row in csv_rows(tmp_path)] == ["1.0", ""]
    assert tensorboard_steps(tmp_path, "train/loss") == [(1, 9.0), (3, 8.0)]


def test_wandb_takes_alerts_and_steps_that_come_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), MetricLog(tmp_path, OFFLINE, {}) as metrics:
        for step in (1, 2):
            metrics.log(step, {"event": "train", "loss": 9.0})
        metrics.alert(ALERT)
        metrics.rewind(1)
        metrics.log(2, {"event": "train", "loss": 8.0})
    assert caplog.records == []
    files = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    wait_until_written(b"the loss is 9", files)
