"""Reports to render, a harmless and a hostile one, and a reader of the page that results."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from vlm.evaluate.report import Answered, Clip, ReportData, write_report

RED, BLUE = (210, 40, 30), (30, 60, 200)
SCRIPT = "<script>alert(1)</script>"
ATTRIBUTE = '"onload="alert(1)" x="\'onclick=\'alert(2)'
EVALUATION = {
    "loss": {"coarse_only": 0.75, "coarse_fine": 0.5, "autoregressive": 0.52},
    "loss_ratio": 1.5,
    "accuracy": {
        "true": {"colour": 0.975, "count": 0.41},
        "blank": {"colour": 0.16, "count": 0.43},
        "shuffled": {"colour": 0.183, "count": 0.4},
    },
    "prior": {"colour": 0.17, "count": 0.44},
    "num_samples": 480,
    "num_answers": {"colour": 480, "count": 200},
}


def train_rows(num_rows: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {
            "event": "train",
            "step": 10 * n,
            "loss": 3 / n,
            "loss_fine": 2.9 / n,
            "loss_coarse": 3.5 / n,
            "loss_ratio": 1 + n / 100,
            "lr_vision": 1e-5,
            "lr_connector": 1e-3,
            "lr_language": None,
            "samples_per_s": 800.0 + n,
            "fill_frac": 0.95,
            "balance": 1.02,
            "data_wait_frac": 0.01,
            "eval_loss": None,
        }
        for n in range(1, num_rows + 1)
    ]
    return [*rows, {"event": "eval", "step": 10 * num_rows, "eval_loss": 0.25}]


def clip(key: str = "clip-0", num_frames: int = 4) -> Clip:
    """Red above blue; attention in the lower right corner."""
    frame = np.zeros((96, 128, 3), np.uint8)
    frame[:48], frame[48:] = RED, BLUE
    attention = np.full((6, 8), 0.001)
    attention[5, 7] = 0.9
    questions = [
        Answered(
            question="What colour is above?", expected="red", predicted=" red ", task="colour"
        ),
        Answered(question="How many frames?", expected="4", predicted="7", task="count"),
    ]
    return Clip(
        key=key,
        frames=[frame] * num_frames,
        attention=[attention] * num_frames,
        questions=questions,
    )


def report(**changes: Any) -> ReportData:
    whole: dict[str, Any] = {
        "title": "quickstart",
        "created": "2026-01-02 03:04 UTC",
        "metrics": train_rows(40),
        "evaluation": EVALUATION,
        "facts": {"recipe": "quickstart", "world size": "2"},
        "clips": [clip("clip-0"), clip("clip-1", num_frames=3)],
    }
    return ReportData(**(whole | changes))


def hostile() -> ReportData:
    evil = SCRIPT + ATTRIBUTE
    answered = Answered(question=evil, expected=evil, predicted=evil, task=evil)
    tasks = {evil: 0.5}
    return ReportData(
        title=evil,
        created=evil,
        metrics=[{evil: evil, "step": 1, "loss": evil, "event": evil}, *train_rows(3)],
        evaluation={
            "loss": {evil: 1.0},
            "accuracy": {"true": tasks, "blank": tasks, "shuffled": tasks},
            "prior": tasks,
            "num_answers": {evil: 3},
        },
        facts={evil: evil},
        clips=[
            Clip(
                key=evil, frames=clip().frames, attention=clip().attention, questions=[answered] * 2
            )
        ],
    )


class Page(HTMLParser):
    """What a browser would make of the page, without one."""

    def __init__(self, report: ReportData, folder: Path) -> None:
        super().__init__()
        self.path = folder / "report.html"
        write_report(self.path, report)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._open = ""
        self.feed(self.path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self._open = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""
        self.text += " "

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts[-1] += data
        elif self._open != "style":
            self.text += data

    def count(self, tag: str, css_class: str = "") -> int:
        return sum(
            name == tag and (not css_class or css_class in attributes.get("class", "").split())
            for name, attributes in self.tags
        )

    def words(self) -> str:
        return " ".join(self.text.split())
