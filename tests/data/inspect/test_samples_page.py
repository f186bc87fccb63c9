import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vlm.data.inspect import samples_page
from vlm.data.inspect.sample_view import Branch, SampleView, Span

SCRIPT = "<script>alert(1)</script>"


def make_view(num_frames: int = 2, **changes: object) -> SampleView:
    frames = np.zeros((num_frames, 32, 48, 3), np.uint8)
    spans = [
        Span("frames", "<|image|>" * 8, [5] * 8, ["<|image|>"] * 8),
        Span("context", "<|user|>What?", [1, 2], ["<|user|>", "What?"]),
        Span("learned", "red", [7], ["red"]),
    ]
    view = SampleView(
        shard=Path("a.tar"),
        offset=512,
        key="00000001",
        source="shapes",
        kind="video",
        form="turns",
        meta={"id": "clip-1"},
        branches=[Branch("", spans)],
        frames=frames,
    )
    return replace(view, **changes)  # type: ignore[arg-type]


def write(tmp_path: Path, views: list[SampleView]) -> str:
    samples_page.write_page(tmp_path / "page.html", views, "samples")
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_page_shows_frames_text_and_mask(tmp_path: Path) -> None:
    text = write(tmp_path, [make_view()])
    body = text.partition("<article")[2]
    assert body.count('src="data:image/jpeg;base64,') == 2
    assert '<mark class="learned">red</mark>' in body
    assert '<span class="frames">8 frame tokens</span>&lt;|user|&gt;What?' in body
    assert "3 text tokens, 1 learned; 8 frame tokens" in body
    assert "2 frames of 32x48" in body
    assert '<li class="token frames"><small>5</small>x 8</li>' in body
    # not by colour alone: brackets and a line as well
    assert re.search(r'mark\.learned::before \{ content: "\\27E6"', text)
    assert re.search(r"mark\.learned, .*text-decoration: underline", text)


def test_pairs_and_faults(tmp_path: Path) -> None:
    branches = [
        Branch(name, [Span("learned", name, [1], [name])]) for name in ("chosen", "rejected")
    ]
    bad = SampleView(shard=Path("a.tar"), offset=0, key="k", fault="no JSON")
    text = write(tmp_path, [make_view(branches=branches), bad])
    assert "<b>chosen</b>" in text and "<b>rejected</b>" in text
    assert "cannot be used" in text and "no JSON" in text
    assert "No sample was found" in write(tmp_path, [])


def test_what_comes_from_shards_is_escaped(tmp_path: Path) -> None:
    spans = [
        Span("learned", f"{SCRIPT}\0\x1b\ud800", [1], [SCRIPT]),
        Span("context", SCRIPT, [2], ['"']),
    ]
    view = make_view(
        key=SCRIPT,
        source=SCRIPT,
        fault=SCRIPT,
        meta={SCRIPT: SCRIPT + "\ud800"},
        branches=[Branch("", spans)],
    )
    text = write(tmp_path, [view])
    assert text.count("<script>") == 1 and SCRIPT not in text
    assert "\ufffd\ufffd\ufffd" in text and not set("\0\x1b") & set(text)
    assert not re.search(r"https?://|url\(", text)
    assert re.search(r"default-src 'none'; img-src data:;.*'sha256-[A-Za-z0-9+/=]{44}'", text)


def test_the_page_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 224, 224, 3), np.uint8)
    monkeypatch.setattr(samples_page, "FRAMES_BYTES", 120_000)
    text = write(tmp_path, [make_view(frames=noise)])
    assert text.count("<img ") == samples_page.MAX_FRAMES
    assert re.findall(r'alt="frame (\d+)"', text)[::15] == ["0", "63"]
    assert 50_000 < len(text) < 140_000
    pieces = ["word"] * 5000
    spans = [Span("context", "word" * 10_000, list(range(5000)), pieces)]
    long = write(tmp_path, [make_view(0, branches=[Branch("", spans)])])
    assert "20,000 more characters" in long and "4,000 more tokens" in long
    monkeypatch.setattr(samples_page, "MAX_SAMPLES", 3)
    assert write(tmp_path, [make_view(0)] * 5).count("<article") == 3
