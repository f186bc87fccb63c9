"""Annotations: what each sample will say and which media it needs, one JSON object a line.

Adapters (`vlm.data.adapters`) make them out of published data sets; ``index`` reads a file of them
once and keeps only where its lines are; ``read`` gets one of them again, in whatever process needs
it. Not here: what is made of them (`vlm.data.precompute`), opening media (`vlm.data.media`).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from vlm.data import media
from vlm.data.schema import (
    FORMS,
    MAX_FRAMES,
    MAX_JSON_BYTES,
    Preference,
    Sample,
    TokenPreference,
    Tokens,
    Turn,
    explain,
)
from vlm.errors import DataError, SampleError


def _inside(ref: str) -> str:
    media.parse_ref(ref)
    return ref


#: what `vlm.data.media` opens, relative to the root folder
Ref = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_inside)]


class Annotation(BaseModel):
    """One sample to be. Without ``video`` and ``images`` it is text only."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: str | int
    source: str = Field(min_length=1, max_length=100)
    #: of the data set; the registry of adapters fills it in
    licence: str | None = Field(None, min_length=1, max_length=100)
    #: samples with the same one fall into the same split; else the video, the first image, the id
    split_key: str | None = Field(None, min_length=1, max_length=1000)
    video: Ref | None = None
    #: in the order of the `<image>` marks
    images: tuple[Ref, ...] = Field((), max_length=MAX_FRAMES)
    #: exactly one of these four, as in the sample
    turns: tuple[Turn, ...] | None = None
    caption: str | None = None
    tokens: Tokens | None = None
    preference: Preference | TokenPreference | None = None
    meta: dict[str, Any] = {}

    @model_validator(mode="after")
    def _consistent(self) -> "Annotation":
        if self.video is not None and self.images:
            raise ValueError("expected `video` or `images`, not both")
        try:
            self.to_sample(len(self.images) if self.video is None else 1)
        except ValidationError as error:
            raise ValueError(explain(error)) from None
        return self

    @property
    def kind(self) -> Literal["text", "image", "video"]:
        if self.video is not None:
            return "video"
        return "image" if self.images else "text"

    @property
    def split_identity(self) -> str:
        return self.split_key or self.video or (self.images[0] if self.images else str(self.id))

    def to_sample(self, num_frames: int) -> Sample:
        words = {name: value for name in FORMS if (value := getattr(self, name)) is not None}
        licence = {"licence": self.licence} if self.licence else {}
        return Sample(
            version=1,
            kind=self.kind,
            source=self.source,
            frame_count=num_frames,
            meta=self.meta | licence | {"id": self.id},
            **words,
        )


class Failure(BaseModel):
    """Why something did not become a sample; one line of ``failed.jsonl``."""

    #: few and short: failures are counted by it
    reason: str
    #: what was found and where
    error: str
    id: str | int | None = None
    #: of annotations.jsonl, from 1 as editors count; None if it never got there
    line: int | None = None


class Line(NamedTuple):
    """Where an annotation is: its line, from 0, and its first byte."""

    number: int
    offset: int


@dataclass(frozen=True)
class Index:
    sha256: str
    video: list[Line]
    image: list[Line]
    text: list[Line]
    failures: list[Failure]

    def by_kind(self) -> list[tuple[Literal["video", "image", "text"], list[Line]]]:
        return [("video", self.video), ("image", self.image), ("text", self.text)]


def index(path: Path) -> Index:
    """Finds every annotation, and its kind; faulty ones become failures.

    Raises:
        DataError: the file cannot be read or holds no line.
    """
    found = Index(_sha256(path), [], [], [], [])
    lines = dict(found.by_kind())
    with path.open("rb") as file:
        for line, raw in _lines(file):
            try:
                annotation = _parse(raw)
            except SampleError as error:
                failure = Failure(line=line.number + 1, reason="bad annotation", error=str(error))
                found.failures.append(failure)
                continue
            lines[annotation.kind].append(line)
    if not (any(lines.values()) or found.failures):
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
