"""One HTML page about a run: scores with their controls, curves, and what the model looked at.

The page needs nothing but itself: images are data URIs, and its Content-Security-Policy forbids
any request and any script but its own. Names and texts come from shards, so the template escapes
all of them. Not here: measuring (``vlm.evaluate``) and drawing (``report_curves``,
``report_charts``, ``report_images``).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlm import page
from vlm.evaluate.report_charts import short
from vlm.evaluate.report_curves import curves, number
from vlm.evaluate.report_images import heat_uri, peak

#: what all frames together may take in the page, in bytes
FRAMES_BYTES = 2_000_000
CONTROLS = ("blank", "shuffled", "prior")


@dataclass(frozen=True)
class Answered:
    question: str
    expected: str
    predicted: str
    task: str

    @property
    def is_right(self) -> bool:
        """By the rule of the accuracies above it: the exact answer."""
        return self.expected.strip() == self.predicted.strip()


@dataclass(frozen=True)
class Clip:
    key: str
    #: (H, W, 3) uint8 each
    frames: list[np.ndarray]
    #: of the last pass, (gh, gw) float each, one per frame; empty when the model has none
    attention: list[np.ndarray] = field(default_factory=list)
    questions: list[Answered] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class ReportData:
    title: str
    #: when, as it shall be shown
    created: str
    #: rows of metrics.jsonl
    metrics: Sequence[Mapping[str, Any]]
    #: eval.json
    evaluation: Mapping[str, Any]
    #: name -> value, shown in this order
    facts: Mapping[str, str]
    clips: Sequence[Clip]


@dataclass(frozen=True, kw_only=True)
class _TaskScore:
    """Accuracies from 0 to 1; None where not measured."""

    task: str
    num_answers: int | None
    true: float | None
    low: float | None
    high: float | None
    controls: dict[str, float | None]
    gain: float | None
    #: about the true frames, in forward modes that are not the model's own
    modes: dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """What was found with the frames in one place of the text."""

    #: empty: not said
    order: str
    scores: list[_TaskScore]
    losses: dict[str, float | None]
    loss_ratio: float | None
    gap_frac: float | None


@dataclass(frozen=True, kw_only=True)
class _Frame:
    element_id: str
    index: int
    width: int
    height: int
    uri: str
    heat: str | None
    peak: float


def write_report(path: Path, report: ReportData) -> None:
    """Writes the page; it stays below about 3 MB with a dozen clips of 16 frames."""
    environment = page.environment("vlm.evaluate")
    environment.filters |= {"number": _number_text, "percent": _percent_text}
    found = report.evaluation
    orders = {found.get("order") or "": found, **(found.get("other_orders") or {})}
    html = environment.get_template("report.html.j2").render(
        report=report,
        orders=[_judged(order, found, judged) for order, judged in orders.items()],
        controls=CONTROLS,
        num_samples=number(found.get("num_samples")),
        charts=curves(report.metrics),
        clips=list(zip(report.clips, _strips(report.clips), strict=True)),
    )
    path.write_text(html, encoding="utf-8", newline="\n")


def _number_text(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else short(value)


def _percent_text(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{100 * value:.1f}%"


def _judged(order: str, evaluation: Mapping[str, Any], judged: Mapping[str, Any]) -> _Judged:
    losses = judged.get("loss") or {}
    return _Judged(
        order=order,
        scores=_scores(evaluation, judged),
        losses={name: number(value) for name, value in losses.items()},
        loss_ratio=number(judged.get("loss_ratio")),
        gap_frac=number(judged.get("autoregressive_gap_frac")),
    )


def _scores(evaluation: Mapping[str, Any], judged: Mapping[str, Any]) -> list[_TaskScore]:
    accuracy = judged.get("accuracy") or {}
    known = {**accuracy, "prior": evaluation.get("prior")}
    by_control = {control: known.get(control) or {} for control in ("true", *CONTROLS)}
    others = list((judged.get("accuracy_by_mode") or {}).items())[1:]  # the first is "true"
    num_answers = evaluation.get("num_answers") or {}
    scores = []
    for task in dict.fromkeys(task for values in by_control.values() for task in values):
        values = {control: number(tasks.get(task)) for control, tasks in by_control.items()}
        true, count = values.pop("true"), number(num_answers.get(task))
        rivals = [value for value in values.values() if value is not None]
        low, high = (None, None) if true is None or not count else wilson(true, count)
        scores.append(
            _TaskScore(
                task=task,
                num_answers=None if count is None else int(count),
                true=true,
                low=low,
                high=high,
                controls=values,
                gain=None if true is None or not rivals else true - max(rivals),
                modes={mode: number((tasks or {}).get(task)) for mode, tasks in others},
            )
        )
    return scores


def wilson(share: float, count: float) -> tuple[float, float]:
    """The 95% interval of a share measured on ``count`` answers (Wilson score)."""
    z = 1.96
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    # A share outside 0 to 1 would be a fault upstream; the page still shows it.
    spread = max(share * (1 - share), 0.0) / count + z * z / (4 * count * count)
    half = z / (1 + z * z / count) * math.sqrt(spread)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def _strips(clips: Sequence[Clip]) -> list[list[_Frame]]:
    num_frames = sum(len(clip.frames) for clip in clips)
    # Base64 makes four bytes of three.
    max_bytes = FRAMES_BYTES * 3 // 4 // max(num_frames, 1)
    return [_strip(f"clip{n}", clip, max_bytes) for n, clip in enumerate(clips)]


def _strip(element_id: str, clip: Clip, max_bytes: int) -> list[_Frame]:
    strip = []
    for index, frame in enumerate(clip.frames):
        seen = clip.attention[index] if index < len(clip.attention) else np.zeros((0, 0))
        has_heat = seen.ndim == 2 and seen.size > 0
        strip.append(
            _Frame(
                element_id=f"{element_id}-frame{index}",
                index=index,
                width=frame.shape[1],
                height=frame.shape[0],
                uri=page.frame_uri(frame, max_bytes),
                heat=heat_uri(seen) if has_heat else None,
                peak=peak(seen) if has_heat else 0.0,
            )
        )
    return strip
