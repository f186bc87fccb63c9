import base64
import hashlib
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.evaluate.report_samples import (
    ATTRIBUTE,
    SCRIPT,
    Page,
    clip,
    hostile,
    report,
    train_rows,
)
from vlm.evaluate.report import Answered, Clip, wilson


def test_the_page_holds_the_numbers(tmp_path: Path) -> None:
    words = Page(report(), tmp_path).words()
    assert "colour accuracy 97.5% blank 16.0% shuffled 18.3% prior 17.0%" in words
    assert "+79.2 points over the best control" in words
    assert "-3.0 points over the best control" in words
    assert "loss ratio coarse / fine 1.500" in words
    low, high = (100 * bound for bound in wilson(0.975, 480))
    table = f"colour 480 97.5% {low:.1f}% to {high:.1f}% 16.0% 18.3% 17.0% +79.2"
    assert table in words
    assert "coarse only 0.75 coarse fine 0.5 autoregressive 0.52 coarse / fine 1.500" in words
    assert "recipe quickstart world size 2" in words
    assert "train 0.075 fine 0.0725 coarse 0.0875 eval 0.25" in words


def test_the_page_holds_clips_frames_and_marks(tmp_path: Path) -> None:
    page = Page(report(), tmp_path)
    assert page.count("article", "clip") == 2
    assert page.count("figure", "frame") == 7
    assert page.count("use") == page.count("image", "cells") == 7
    assert page.count("image") == 14
    words = page.words()
    assert words.count("\N{CHECK MARK} right") == words.count("\N{BALLOT X} wrong") == 2
    assert "clip-1 3 frames, 1 of 2 right" in words
    assert "question, colour What colour is above? expected red predicted red" in words
    uses = [attributes["href"] for tag, attributes in page.tags if tag == "use"]
    ids = ["#" + attributes["id"] for tag, attributes in page.tags if "id" in attributes]
    assert uses == ids
    assert len(set(ids)) == 7


@pytest.mark.parametrize("build", [report, hostile])
def test_nothing_but_itself_is_asked_for_or_run(tmp_path: Path, build: Any) -> None:
    page = Page(build(), tmp_path)
    (script,) = page.scripts
    policies = [
        attributes["content"]
        for tag, attributes in page.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    sha = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert [p.split("; ") for p in policies] == [
        [
            "default-src 'none'",
            "img-src data:",
            "style-src 'unsafe-inline'",
            f"script-src 'sha256-{sha}'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    ]
    for tag, attributes in page.tags:
        assert tag not in {"link", "iframe", "object", "embed", "form", "base"}
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in {"href", "src", "srcset", "xlink:href"}:
                assert re.match(r"data:image/(jpeg|png);base64,|#", value), (tag, value[:80])
    assert "url(" not in page.path.read_text(encoding="utf-8")


def test_hostile_texts_are_shown_as_they_are(tmp_path: Path) -> None:
    page = Page(hostile(), tmp_path)
    # Title twice, created, fact twice, task in headline, table and answers, loss name, key, ...
    assert page.text.count(SCRIPT) >= 16
    assert page.text.count(ATTRIBUTE) >= 15, "a loss name has its underscores replaced"
    assert page.count("script") == 1


def test_texts_are_bounded_and_printable(tmp_path: Path) -> None:
    odd = Clip(key="\ud800\x00" + "k" * 10**6, frames=[], questions=[])
    page = Page(report(clips=[odd], title="\ud800"), tmp_path)
    assert "\ufffd\ufffdkkk" in page.text
    assert page.path.stat().st_size < 200_000


HOLES = np.full((2, 2), np.nan)


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": [], "evaluation": {}, "facts": {}, "clips": [], "title": "", "created": ""},
        {"metrics": [{"event": "checkpoint", "step": 3}]},
        {"metrics": [{"event": "train", "step": 1, "loss": float("nan"), "lr_vision": 0.0}]},
        {"metrics": train_rows(1)[:1]},
        {"evaluation": {"accuracy": {"true": {"colour": float("nan"), "b": None, "c": 1.0}}}},
        {"evaluation": {"accuracy": None, "loss": None, "prior": {"colour": 0.2}}},
        {"evaluation": {"loss_ratio": float("inf"), "loss": {"coarse_only": None}}},
        {"evaluation": {"accuracy": {"true": {"a": 0.5}}, "num_answers": {"a": 0}}},
        {"clips": [Clip(key="no-attention", frames=clip().frames)]},
        {"clips": [Clip(key="text", frames=[], questions=clip().questions)]},
        {"clips": [Clip(key="short", frames=clip().frames, attention=clip().attention[:1])]},
        {
            "clips": [
                Clip(key="holes", frames=clip().frames, attention=[np.full((2, 2), np.nan)] * 4)
            ]
        },
        {"clips": [Clip(key="flat", frames=clip().frames, attention=[np.zeros(0)] * 4)]},
    ],
)
def test_missing_pieces_do_not_break_it(tmp_path: Path, changes: dict) -> None:
    page = Page(report(**changes), tmp_path)
    assert page.count("h2") == 3
    assert not re.search(r"\b(nan|inf|None|Undefined)\b", page.words())


def test_a_clip_without_attention_says_so(tmp_path: Path) -> None:
    page = Page(report(clips=[Clip(key="k", frames=clip().frames)]), tmp_path)
    assert "4 frames, no attention recorded" in page.words()
    assert page.count("use") == 0


def test_the_file_stays_small(tmp_path: Path) -> None:
    """Noise is the worst that a JPEG can meet, 100k rows are more than a run logs."""
    rng = np.random.default_rng(0)
    clips = [
        Clip(
            key=str(n),
            frames=list(rng.integers(0, 256, (16, 224, 224, 3), np.uint8)),
            attention=list(rng.random((16, 16, 16))),
        )
        for n in range(12)
    ]
    page = Page(report(clips=clips, metrics=train_rows(20_000)), tmp_path)
    assert page.count("figure", "frame") == 192
    assert page.path.stat().st_size < 3_000_000


def test_right_and_wrong() -> None:
    def is_right(expected: str, predicted: str) -> bool:
        return Answered(question="", expected=expected, predicted=predicted, task="").is_right

    assert is_right("red", " red\n")
    assert not is_right("red", "Red")
    assert not is_right("red", "red and blue")
    assert not is_right("red", "")


def test_wilson_is_the_root_of_its_definition() -> None:
    """Its bounds are the shares p at which the observed one lies 1.96 standard errors away."""
    for share, count in itertools.product((0.0, 0.1, 0.5, 0.97, 1.0), (1, 10, 480)):
        low, high = wilson(share, count)
        assert 0 <= low <= share <= high <= 1
        for bound in {low, high} - {0.0, 1.0}:
            error = (bound * (1 - bound) / count) ** 0.5
            assert abs(share - bound) == pytest.approx(1.96 * error, rel=1e-6)
