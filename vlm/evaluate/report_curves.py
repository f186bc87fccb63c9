"""Which curves of a run the report page shows: rows of metrics.jsonl in, charts out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlm.evaluate.report_charts import Chart, Scale, Series, draw

#: beyond this a value is a fault, and a chart that holds it shows nothing else
_MAX_VALUE = 1e30


@dataclass(frozen=True, kw_only=True)
class _Line:
    column: str
    label: str
    style: int = 0
    dots: bool = False


@dataclass(frozen=True, kw_only=True)
class _Plot:
    title: str
    unit: str
    lines: tuple[_Line, ...]
    scale: Scale = "data"
    note: str = ""


_PLOTS = (
    _Plot(
        title="Loss",
        unit="cross entropy, nats per token",
        lines=(
            _Line(column="loss", label="train"),
            _Line(column="loss_fine", label="fine", style=1),
            _Line(column="loss_coarse", label="coarse", style=2),
            _Line(column="eval_loss", label="eval", dots=True),
            _Line(column="eval_loss_fine", label="eval fine", style=1, dots=True),
            _Line(column="eval_loss_coarse", label="eval coarse", style=2, dots=True),
        ),
    ),
    _Plot(
        title="Loss ratio",
        unit="coarse / fine",
        lines=(
            _Line(column="loss_ratio", label="train"),
            _Line(column="eval_loss_ratio", label="eval", dots=True, style=1),
        ),
        note="Above 1, looking again where the language model chose beats a glance.",
    ),
    _Plot(
        title="Learning rate",
        unit="per component",
        lines=(
            _Line(column="lr_vision", label="vision"),
            _Line(column="lr_connector", label="connector", style=1),
            _Line(column="lr_language", label="language", style=2),
        ),
    ),
    _Plot(
        title="Throughput",
        unit="samples/s, all ranks",
        lines=(_Line(column="samples_per_s", label="samples/s"),),
        scale="from_zero",
    ),
    _Plot(
        title="Use of the hardware",
        unit="share, or ratio for balance",
        lines=(
            _Line(column="fill_frac", label="fill"),
            _Line(column="balance", label="balance", style=1),
            _Line(column="data_wait_frac", label="data wait", style=2),
            _Line(column="text_frac", label="text only", style=3),
        ),
        scale="from_zero",
        note="Balance is the busiest rank's cost / the mean: 1 is even. Data wait is best at 0.",
    ),
    _Plot(
        title="Gradient norm",
        unit="before clipping",
        lines=(_Line(column="grad_norm", label="gradient norm"),),
    ),
    _Plot(
        title="Attention entropy",
        unit="nats",
        lines=(
            _Line(column="attention_entropy", label="fine"),
            _Line(column="attention_entropy_static", label="coarse", style=1),
            _Line(column="attention_entropy_max", label="everywhere alike", style=2),
        ),
        note="Near the highest: the model looks everywhere alike.",
    ),
    _Plot(
        title="Looks",
        unit="cosine of frames in a row; change in standard deviations",
        lines=(
            _Line(column="query_similarity", label="queries"),
            _Line(column="look_similarity", label="what they saw", style=1),
            _Line(column="look_change", label="change from coarse to fine", style=2),
        ),
        note="Queries at 1, or no change: nothing is chosen.",
    ),
    _Plot(
        title="Scales",
        unit="standard deviation",
        lines=(
            _Line(column="q_static_std", label="q_static"),
            _Line(column="visual_std", label="visual tokens", style=1),
            _Line(column="embedding_std", label="text embeddings", style=2),
        ),
    ),
    _Plot(
        title="Peak memory",
        unit="GB",
        lines=(_Line(column="peak_memory_gb", label="peak memory"),),
        scale="from_zero",
    ),
)


def curves(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """The charts that have something to show, in the page's order."""
    charts = []
    for plot in _PLOTS:
        series: list[Series] = []
        for line in plot.lines:
            points = _points(rows, line.column)
            twin = next((s for s in series if points and s.points == points), None)
            if twin is not None:  # without a coarse weight the loss is the fine one: one line
                merged = replace(twin, label=f"{twin.label} = {line.label}")
                series[series.index(twin)] = merged
            else:
                series.append(
                    Series(label=line.label, points=points, dots=line.dots, style=line.style)
                )
        num_faults = sum(_is_fault(row.get(line.column)) for row in rows for line in plot.lines)
        faults = (
            f"Values not drawn because they are not finite: {num_faults}." if num_faults else ""
        )
        note = f"{plot.note} {faults}".strip()
        chart = draw(plot.title, plot.unit, series, scale=plot.scale, note=note)
        if chart is not None:
            charts.append(chart)
    return charts


def _points(rows: Sequence[Mapping[str, Any]], column: str) -> list[tuple[float, float]]:
    pairs = ((number(row.get("step")), number(row.get(column))) for row in rows)
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def number(value: object) -> float | None:
    """A finite float, also from text such as metrics.jsonl has for NaN; else None."""
    if not isinstance(value, int | float | str) or isinstance(value, bool):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if abs(found) < _MAX_VALUE else None


def _is_fault(value: object) -> bool:
    return value is not None and number(value) is None
