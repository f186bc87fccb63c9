"""Annotation files: JSON lines, each a conversation or caption about one video, or about none.

``index`` reads a file once and keeps only where its lines are; ``read`` gets one of them again, in
whatever process needs it. Not here: what is made of them (`vlm.data.precompute`).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vlm.data.schema import MAX_JSON_BYTES, Sample, Turn, check_conversation, explain
from vlm.errors import DataError, SampleError


class Annotation(BaseModel):
    """One line. Without ``video`` it is a text sample."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: str | int
    source: str = Field(min_length=1, max_length=100)
    #: relative to the root folder
    video: str | None = Field(None, min_length=1)
    turns: tuple[Turn, ...] | None = None
    caption: str | None = None
    meta: dict[str, Any] = {}

    @model_validator(mode="after")
    def _consistent(self) -> "Annotation":
        check_conversation(self.turns, self.caption)
        if self.video is not None:
            path = PurePosixPath(self.video)
            if path.is_absolute() or ".." in path.parts:
                raise ValueError("`video` leads out of the root folder; expected a path inside")
        return self

    def to_sample(self, num_frames: int) -> Sample:
        words = {"turns": self.turns} if self.turns is not None else {"caption": self.caption}
        return Sample(
            version=1,
            kind="text" if self.video is None else "video",
            source=self.source,
            frame_count=num_frames,
            meta=self.meta | {"id": self.id},
            **words,
        )


class Line(NamedTuple):
    """Where an annotation is: its line, from 0, and its first byte."""

    number: int
    offset: int


class Failure(BaseModel):
    """Why an annotation did not become a sample; one line of ``failed.jsonl``."""

    #: from 1, as editors count
    line: int
    id: str | int | None
    reason: str
    error: str


@dataclass(frozen=True)
class Index:
    sha256: str
    video: list[Line]
    text: list[Line]
    failures: list[Failure]

    def by_kind(self) -> list[tuple[Literal["video", "text"], list[Line]]]:
        return [("video", self.video), ("text", self.text)]


def index(path: Path) -> Index:
    """Finds every annotation, and whether it is about a video; faulty ones become failures.

    Raises:
        DataError: the file cannot be read or holds no line.
    """
    found = Index(_sha256(path), [], [], [])
    with path.open("rb") as file:
        for line, raw in _lines(file):
            try:
                annotation = _parse(raw)
            except SampleError as error:
                failure = Failure(
                    line=line.number + 1, id=None, reason="bad annotation", error=str(error)
                )
                found.failures.append(failure)
                continue
            (found.text if annotation.video is None else found.video).append(line)
    if not (found.video or found.text or found.failures):
        raise DataError(f"annotations {path}: the file is empty; expected one JSON object a line")
    return found


def read(file: BinaryIO, line: Line) -> Annotation:
    """One annotation of an indexed file."""
    file.seek(line.offset)
    return _parse(file.readline(MAX_JSON_BYTES + 1))


def _lines(file: BinaryIO) -> Iterator[tuple[Line, bytes]]:
    number = offset = 0
    while raw := file.readline(MAX_JSON_BYTES + 1):
        length = len(raw)
        while not raw.endswith(b"\n") and (rest := file.readline(MAX_JSON_BYTES)):
            # too long a line is one fault, not several
            length += len(rest)
            if rest.endswith(b"\n"):
                break
        if raw.strip():
            yield Line(number, offset), raw
        number += 1
        offset += length


def _parse(raw: bytes) -> Annotation:
    if len(raw) > MAX_JSON_BYTES:
        raise SampleError(f"a line of more than {MAX_JSON_BYTES} bytes")
    try:
        return Annotation.model_validate_json(raw)
    except ValidationError as error:
        raise SampleError(explain(error)) from None


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"annotations {path}: {error.strerror}; expected JSON lines") from None
