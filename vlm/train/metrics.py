"""Where a run's numbers go: ``metrics.jsonl`` and ``metrics.csv``, and what draws them live.

The two files are the record; every row holds every column of ``COLUMNS``. TensorBoard and W&B are
views of the same rows: one that cannot start or breaks is dropped with one warning, the run goes
on. Not here: measuring (``vlm.train.loop``) and the report page (``vlm.evaluate.report``).
"""

import csv
import io
import json
import logging
import math
import os
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from vlm import dist
from vlm.config_train import LogConfig
from vlm.errors import CheckpointError, one_line

log = logging.getLogger(__name__)

Value = float | str | None

#: Every row of metrics.jsonl and metrics.csv, in this order. A value that was not measured is null.
COLUMNS = (
    "event",  # "train", "eval" or "checkpoint"
    "step",  # global steps done
    "epoch",
    "samples_seen",
    "tokens_seen",
    "wall_s",  # time in training, over all resumes
    "loss",  # what is minimised, per loss token of the whole step
    "loss_fine",  # cross entropy of the fine pass
    "loss_fine_first",  # of the first fine pass, where there are several
    "loss_coarse",  # cross entropy of the coarse pass
    "loss_ratio",  # coarse / fine
    "grad_norm",  # before clipping
    "lr_vision",
    "lr_connector",
    "lr_language",
    "samples_per_s",  # over all ranks
    "tokens_per_s",  # over all ranks
    "fill_frac",  # real cost of the micro-batches / their budget
    "balance",  # cost of the busiest rank / mean over ranks
    "text_frac",  # text-only samples among all
    "data_wait_frac",  # share of the time in which the model waited for data
    "peak_memory_gb",
    "attention_entropy",
    "eval_loss",
    "eval_loss_fine",
    "eval_loss_fine_first",
    "eval_loss_coarse",
    "eval_loss_ratio",
    "checkpoint_stall_s",  # for which training stood still
    "checkpoint_gb",
)
EVENTS = ("train", "eval", "checkpoint")


class _View(Protocol):
    def log(self, step: int, scalars: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricLog:
    """The metric files of one run, written by rank 0; on other ranks every method does nothing.

    Args:
        run_dir: folder of the run, created if need be.
        log_config: which views to feed beside the files.
        recipe_dict: the resolved recipe, shown by W&B.
        resume_step: global steps the checkpoint had done; later rows are dropped. None starts
            the files anew.

    Raises:
        CheckpointError: metrics.jsonl of the resumed run is damaged before its last line.
    """

    def __init__(
        self,
        run_dir: Path,
        log_config: LogConfig,
        recipe_dict: dict[str, Any],
        resume_step: int | None = None,
    ) -> None:
        self._is_main = dist.is_main()
        self._views: dict[str, _View] = {}
        if not self._is_main:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        jsonl_path, csv_path = run_dir / "metrics.jsonl", run_dir / "metrics.csv"
        rows = [] if resume_step is None else _rows_until(jsonl_path, resume_step)
        # The CSV is always derived anew, so a kill between the two files mends itself.
        _replace(jsonl_path, "".join(map(_json_line, rows)))
        _replace(csv_path, _csv_line(dict(zip(COLUMNS, COLUMNS, strict=True))))
        self._jsonl = jsonl_path.open("a", encoding="utf-8", newline="\n")
        self._csv = csv_path.open("a", encoding="utf-8", newline="")
        self._csv.write("".join(map(_csv_line, rows)))
        self._csv.flush()
        if log_config.tensorboard:
            self._open("TensorBoard", lambda: _TensorBoard(run_dir, resume_step))
        if log_config.wandb != "disabled":
            self._open("W&B", lambda: _WandB(run_dir, log_config, recipe_dict, resume_step))

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """Appends one row; ``values`` holds ``event`` and any other columns but ``step``."""
        if not self._is_main:
            return
        unknown = values.keys() - set(COLUMNS)
        assert not unknown and "step" not in values, f"not for log(): {unknown or 'step'}"
        assert values["event"] in EVENTS, values["event"]
        row: dict[str, Value] = {column: values.get(column) for column in COLUMNS}
        row["step"] = step
        self._jsonl.write(_json_line(row))
        self._jsonl.flush()
        self._csv.write(_csv_line(row))
        self._csv.flush()
        event = values["event"]
        scalars = {
            f"{event}/{column}": value
            for column, value in row.items()
            if column != "step" and isinstance(value, int | float)
        }
        for name in list(self._views):
            self._attempt(name, partial(self._views[name].log, step, scalars))

    def close(self) -> None:
        if not self._is_main:
            return
        for name in list(self._views):
            self._attempt(name, self._views[name].close)
        self._views.clear()
        self._jsonl.close()
        self._csv.close()

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self, name: str, build: Callable[[], _View]) -> None:
        def add() -> None:
            self._views[name] = build()

        self._attempt(name, add)

    def _attempt(self, name: str, action: Callable[[], None]) -> None:
        # Any error at all: a view talks to a network, a helper process and a disk quota of its
        # own, and none of them may end a run whose numbers are already safe in the files.
        try:
            action()
        except Exception as error:
            self._views.pop(name, None)
            text = f"{type(error).__name__}: {one_line(error)}"
            key = os.environ.get("WANDB_API_KEY")
            if key:
                text = text.replace(key, "***")
            log.warning("%s is off for this run, the metric files go on: %s", name, text)


class _TensorBoard:
    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        # Here, because tensorboard is optional and slow to import.
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """One W&B run for the whole run folder: its id is kept there and taken up on resume."""

    def __init__(
        self, run_dir: Path, config: LogConfig, recipe: dict[str, Any], resume_step: int | None
    ) -> None:
        # Here, because wandb is optional, slow to import, and unwanted when it is disabled.
        import wandb

        id_path = run_dir / "wandb_run_id"
        if resume_step is None or not id_path.exists():
            _replace(id_path, uuid.uuid4().hex)
        # Nothing may wait for a person or a dead network while GPUs are rented: silent means no
        # prompt for a key, and what is not uploaded in time `wandb sync` makes up. W&B asks for
        # the key before it reads what init is given, hence setup.
        settings = wandb.Settings(
            silent=True, console="off", login_timeout=10, init_timeout=60, finish_timeout=120
        )
        wandb.setup(settings)
        self._run = wandb.init(
            project=config.wandb_project,
            name=run_dir.name,
            id=id_path.read_text(encoding="utf-8").strip(),
            resume="allow",
            mode=config.wandb,
            dir=run_dir,
            config=recipe,
            settings=settings,
        )

    def log(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def close(self) -> None:
        self._run.finish()


def read_rows(path: Path) -> list[dict[str, Value]]:
    """The rows of a metrics.jsonl. A last line cut short by a kill is left out.

    Raises:
        CheckpointError: the file cannot be read, or another line is not a row.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise CheckpointError(
            f"metrics {path}: {error.strerror}; expected the file a training run writes there"
        ) from None
    rows = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is torn
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int | float):
            raise CheckpointError(
                f"metrics {path} line {number}: found {line[:60]!r}, expected a JSON object with a "
                "`step`; remove that line"
            )
        rows.append({name: _revive(value) for name, value in row.items()})
    return rows


def _rows_until(path: Path, last_step: int) -> list[dict[str, Value]]:
    if not path.exists():
        return []
    rows = ({c: row.get(c) for c in COLUMNS} for row in read_rows(path))
    return [row for row in rows if row["step"] <= last_step]  # type: ignore[operator]


def _portable(value: Value) -> Value:
    """JSON has no NaN: it goes as the string that ``float`` and every CSV reader understand."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _revive(value: Value) -> Value:
    return float(value) if value in ("nan", "inf", "-inf") else value


def _json_line(row: dict[str, Value]) -> str:
    plain = {name: _portable(value) for name, value in row.items()}
    return json.dumps(plain, allow_nan=False) + "\n"


def _csv_line(row: dict[str, Value]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(row.values())
    return text.getvalue()


def _replace(path: Path, text: str) -> None:
    """Puts ``text`` at ``path`` such that a kill leaves the old file or the new one."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
