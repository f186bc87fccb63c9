"""Samples as one HTML page to browse: frames, rendered text, and which of it is learned.

What is learned is coloured, underlined and bracketed. Frames are thumbnails, bounded in number and
bytes. The page needs nothing but itself (`vlm.page`). Not here: how a sample is seen
(`vlm.data.inspect.sample_view`).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlm import page
from vlm.data.inspect.sample_view import Branch, SampleView, Span

#: what all frames together may take in the page, in bytes
FRAMES_BYTES = 6_000_000
#: of one sample, evenly spread
MAX_FRAMES = 16
MAX_SAMPLES = 500
#: of the text and of the tokens of one sequence
MAX_CHARS = 20_000
MAX_TOKENS = 1000


@dataclass(frozen=True)
class _Frame:
    index: int
    uri: str


@dataclass(frozen=True)
class _Sequence:
    name: str
    spans: list[Span]
    #: characters that are not shown
    num_cut: int
    num_tokens: int
    num_learned: int
    num_frame_tokens: int
    #: (kind, id, text) of the first tokens; frames are one entry
    tokens: list[tuple[str, str, str]]
    num_tokens_cut: int


@dataclass(frozen=True)
class _Card:
    view: SampleView
    meta: str
    frames: list[_Frame]
    sequences: list[_Sequence]


def write_page(path: Path, views: Sequence[SampleView], title: str) -> None:
    """Writes the page about at most `MAX_SAMPLES` samples.

    Args:
        title: What is shown, in one line.
    """
    views = views[:MAX_SAMPLES]
    shown = [_frame_numbers(len(view.frames)) for view in views]
    # base64 makes four bytes of three
    max_bytes = FRAMES_BYTES * 3 // 4 // max(1, sum(map(len, shown)))
    cards = [
        _Card(
            view=view,
            meta=json.dumps(view.meta, ensure_ascii=False) if view.meta else "",
            frames=[_Frame(i, page.frame_uri(view.frames[i], max_bytes)) for i in numbers],
            sequences=[_sequence(branch) for branch in view.branches],
        )
        for view, numbers in zip(views, shown, strict=True)
    ]
    template = page.environment("vlm.data").get_template("samples.html.j2")
    path.write_text(template.render(title=title, cards=cards), encoding="utf-8", newline="\n")


def _frame_numbers(count: int) -> list[int]:
    return np.linspace(0, count - 1, min(count, MAX_FRAMES)).round().astype(int).tolist()


def _sequence(branch: Branch) -> _Sequence:
    spans, left = [], MAX_CHARS
    for span in branch.spans:
        text = page.printable(span.text[: max(left, 0)], keep="\n\t")
        if text:
            spans.append(span._replace(text=text))
        left -= 0 if span.kind == "frames" else len(span.text)
    tokens = _tokens(branch)
    return _Sequence(
        name=branch.name,
        spans=spans,
        num_cut=max(0, -left),
        num_tokens=branch.num_tokens("learned") + branch.num_tokens("context"),
        num_learned=branch.num_tokens("learned"),
        num_frame_tokens=branch.num_tokens("frames"),
        tokens=tokens[:MAX_TOKENS],
        num_tokens_cut=max(0, len(tokens) - MAX_TOKENS),
    )


def _tokens(branch: Branch) -> list[tuple[str, str, str]]:
    tokens = []
    for span in branch.spans:
        if span.kind == "frames":
            tokens.append(("frames", str(span.ids[0]), f"x {len(span.ids)}"))
            continue
        for token, piece in zip(span.ids, span.pieces, strict=True):
            # repr shows blanks and line ends
            tokens.append((span.kind, str(token), page.printable(repr(piece)[1:-1])))
    return tokens
