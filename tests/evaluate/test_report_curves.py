import json
import math

from vlm.evaluate.report_charts import Chart
from vlm.evaluate.report_curves import curves, number
from vlm.train.metrics import COLUMNS


def by_title(rows: list[dict]) -> dict[str, Chart]:
    return {chart.title: chart for chart in curves(rows)}


def test_every_column_that_is_drawn_exists() -> None:
    rows = [{column: 1.0 + 0.1 * n for n, column in enumerate(COLUMNS)} | {"step": s} for s in "12"]
    lines = [line for chart in curves(rows) for line in chart.lines]
    one_at_a_time = [len(curves([{"step": 1, column: 1.0}])) for column in COLUMNS]
    assert len(lines) == sum(one_at_a_time), "a misspelt column would be drawn in neither"
    assert len(lines) == 27


def test_train_and_eval_rows_meet_in_one_chart() -> None:
    rows = [
        {"event": "train", "step": 1, "loss": 3.0, "loss_coarse": 4.0, "eval_loss": None},
        {"event": "train", "step": 2, "loss": 2.0, "loss_coarse": 3.5, "eval_loss": None},
        {"event": "eval", "step": 2, "loss": None, "eval_loss": 2.5},
        {"event": "checkpoint", "step": 2},
    ]
    loss = by_title(rows)["Loss"]
    assert [(line.label, line.dots, line.last) for line in loss.lines] == [
        ("train", False, "2"),
        ("coarse", False, "3.5"),
        ("eval", True, "2.5"),
    ]
    assert list(by_title(rows)) == ["Loss"]


def test_curves_that_coincide_are_one() -> None:
    rows = [{"step": n, "loss": 1 / n, "loss_fine": 1 / n} for n in (1, 2, 3)]
    assert [line.label for line in by_title(rows)["Loss"].lines] == ["train = fine"]


def test_values_that_cannot_be_drawn_are_counted() -> None:
    losses = [2.0, "nan", math.nan, math.inf, None, 1.0, 1e300]
    chart = by_title([{"step": n, "loss": loss} for n, loss in enumerate(losses)])["Loss"]
    assert json.loads(chart.hover)["series"][0]["points"] == [[0, 2.0], [5, 1.0]]
    assert chart.note == "Values not drawn because they are not finite: 4."


def test_no_rows() -> None:
    assert curves([]) == []
    assert curves([{"loss": 1.0}, {"step": "x", "loss": 1.0}, {}]) == []


def test_number() -> None:
    assert number("0.5") == 0.5
    assert number(3) == 3.0
    assert [number(v) for v in (None, True, "", "<b>", [1], 10**400, "1e999")] == [None] * 7
