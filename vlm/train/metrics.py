"""Where a run's numbers go: ``metrics.jsonl`` and ``metrics.csv``, and what draws them live.

The two files are the record; every row holds every column of ``COLUMNS``. TensorBoard and W&B are
views of the same rows: one that cannot start or breaks is dropped with one warning, the run goes
on. Not here: measuring (``vlm.train.meter``), what makes a row (``vlm.train.watch``), and the
report page (``vlm.evaluate.report``).
"""

import csv
import io
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from vlm import dist
from vlm.ckpt.files import replace_text
from vlm.config_train import LogConfig
from vlm.errors import CheckpointError, one_line
from vlm.train.health import Alert
from vlm.train.portable import dumps, revive
from vlm.train.views import TensorBoard, WandB

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
    "elapsed_s",  # time in training, evaluations and checkpoints, over all resumes
    "left_s",  # for the steps that are left, if all goes on as since the last start
    "cost",  # of elapsed_s at log.gpu_price_per_hour for each rank
    "cost_left",
    "loss",  # what is minimised, per loss token of the whole step
    "loss_fine",  # cross entropy of the fine pass
    "loss_caption",  # cross entropy, where fine and coarse are square errors
    "loss_fine_first",  # of the first fine pass, where there are several
    "loss_coarse",  # cross entropy of the coarse pass
    "loss_ratio",  # coarse / fine
    "reward_accuracy",  # share of pairs whose chosen answer gained more than the rejected one
    "reward_margin",  # by how much, times beta
    "loss_text",  # what is predicted, by the kind of the sample
    "loss_image",
    "loss_video",
    "loss_ema",  # what a spike is compared with
    "grad_norm",  # before clipping; of all components together
    "grad_norm_vision",
    "grad_norm_connector",
    "grad_norm_language",
    "grad_norm_ema",
    "clip_frac",  # share of steps that were clipped, as a moving average
    "steps_since_best",  # since loss_ema was lowest
    "lr_vision",
    "lr_connector",
    "lr_language",
    "samples_per_s",  # over all ranks
    "tokens_per_s",  # over all ranks
    "frames_per_s",  # over all ranks
    "tflops_per_s",  # over all ranks, of the model's mathematics: no padding, nothing twice
    "mfu_frac",  # the same over what the GPUs can do; null on a CPU
    "fill_frac",  # real cost of the micro-batches / their budget
    "balance",  # cost of the busiest rank / mean over ranks
    "text_frac",  # text-only samples among all
    "data_wait_frac",  # share of the time in which the model waited for data
    "peak_memory_gb",
    "attention_entropy",  # of the fine pass' queries on their frames, nats
    "attention_entropy_static",  # of the coarse pass' one query
    "attention_entropy_max",  # of attention that is alike everywhere
    "query_similarity",  # cosine of the queries of two frames in a row
    "look_similarity",  # of what they saw
    "look_change",  # mean distance of fine from coarse tokens, in their standard deviations
    "q_static_std",
    "visual_std",  # of the tokens that frames become
    "embedding_std",  # of the text's embeddings
    "visual_ratio",  # of the two
    "eval_loss",
    "eval_loss_fine",
    "eval_loss_caption",
    "eval_loss_fine_first",
    "eval_loss_coarse",
    "eval_loss_ratio",
    "eval_loss_autoregressive",  # as at inference
    "eval_reward_accuracy",
    "eval_reward_margin",
    "checkpoint_stall_s",  # for which training stood still
    "checkpoint_gb",
)

EVENTS = ("train", "eval", "checkpoint")


def column(name: str) -> str:
    """Of a loss or reward that the model names."""
    return name if name == "loss" or name.startswith("reward_") else f"loss_{name}"


class _View(Protocol):
    def log(self, step: int, scalars: dict[str, float]) -> None: ...

    def alert(self, alert: Alert) -> None: ...

    def rewind(self, step: int) -> None: ...

    def close(self) -> None: ...


class MetricLog:
    """The metric files of one run, written by rank 0; on other ranks every method does nothing.

    Args:
        run_dir: folder of the run, created if need be.
        log_config: which views to feed beside the files.
        recipe_dict: the resolved recipe, shown by W&B.
        resume_step: global steps the checkpoint had done; later rows are dropped. None starts
            the files anew.
        more_columns: behind ``COLUMNS``; of this run alone.

    Raises:
        CheckpointError: metrics.jsonl of the resumed run is damaged before its last line.
    """

    def __init__(
        self,
        run_dir: Path,
        log_config: LogConfig,
        recipe_dict: dict[str, Any],
        resume_step: int | None = None,
        more_columns: Sequence[str] = (),
    ) -> None:
        self._is_main = dist.is_main()
        self._views: dict[str, _View] = {}
        self._columns = (*COLUMNS, *more_columns)
        self._run_dir = run_dir
        if not self._is_main:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        self._open_files(resume_step)
        if log_config.tensorboard:
            self._open("TensorBoard", lambda: TensorBoard(run_dir, resume_step))
        if log_config.wandb != "disabled":
            self._open("W&B", lambda: WandB(run_dir, log_config, recipe_dict, resume_step))

    def _open_files(self, resume_step: int | None) -> None:
        jsonl_path, csv_path = self._run_dir / "metrics.jsonl", self._run_dir / "metrics.csv"
        rows = []
        if resume_step is not None:
            rows = _rows_until(jsonl_path, resume_step, self._columns)
        # The CSV is always derived anew, so a kill between the two files mends itself.
        replace_text(jsonl_path, "".join(map(_json_line, rows)))
        replace_text(csv_path, _csv_line(dict(zip(self._columns, self._columns, strict=True))))
        self._jsonl = jsonl_path.open("a", encoding="utf-8", newline="\n")
        self._csv = csv_path.open("a", encoding="utf-8", newline="")
        self._csv.write("".join(map(_csv_line, rows)))
        self._csv.flush()

    def rewind(self, step: int) -> None:
        """Drops the rows after a step: the run went back to it."""
        if not self._is_main:
            return
        self._jsonl.close()
        self._csv.close()
        self._open_files(step)
        for name in list(self._views):
            self._attempt(name, partial(self._views[name].rewind, step))

    def alert(self, alert: Alert) -> None:
        """Shows an alert where there is a place for it."""
        for name in list(self._views):
            self._attempt(name, partial(self._views[name].alert, alert))

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """Appends one row; ``values`` holds ``event`` and any other columns but ``step``."""
        if not self._is_main:
            return
        unknown = values.keys() - set(self._columns)
        assert not unknown and "step" not in values, f"not for log(): {unknown or 'step'}"
        assert values["event"] in EVENTS, values["event"]
        row: dict[str, Value] = {column: values.get(column) for column in self._columns}
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

    def __exit__(self, *_: object) -> None:
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
        rows.append({name: revive(value) for name, value in row.items()})
    return rows


def _rows_until(path: Path, last_step: int, columns: Sequence[str]) -> list[dict[str, Value]]:
    if not path.exists():
        return []
    rows = ({c: row.get(c) for c in columns} for row in read_rows(path))
    return [row for row in rows if row["step"] <= last_step]  # type: ignore[operator]


def _json_line(row: dict[str, Value]) -> str:
    return dumps(row) + "\n"


def _csv_line(row: dict[str, Value]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(row.values())
    return text.getvalue()
