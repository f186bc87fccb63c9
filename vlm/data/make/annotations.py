"""Annotations: what each sample will say and which media it needs, one JSON object a line.

Adapters (`vlm.data.make.adapters`) make them out of published data sets; ``index`` reads a file of
them once and keeps only where its lines are; ``read`` gets some of them again, in whatever process
needs them. Not here: who writes that file (`vlm.data.make.spool`), what is made of them
(`vlm.data.make.precompute`), opening media (`vlm.data.make.media`).
"""

import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from vlm.data.format.schema import (
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
from vlm.data.make import media
from vlm.errors import DataError


def _inside(ref: str) -> str:
    media.parse_ref(ref)
    return ref


Kind = Literal["text", "image", "video"]
KINDS: tuple[Kind, ...] = ("video", "image", "text")
DELETE_IT = "delete the output folder and start again"

#: what `vlm.data.make.media` opens, relative to the root folder
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
    def kind(self) -> Kind:
        return kind_of(self.video, self.images)

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

    @field_validator("error", mode="before")
    @classmethod
    def _writable(cls, error: str) -> str:
        # it may quote a file or member whose name is no UTF-8
        return error.encode(errors="backslashreplace").decode()


class Lines(NamedTuple):
    """Where annotations are: their lines, from 0, and the first byte of each."""

    numbers: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def chunks(self, size: int) -> "list[Lines]":
        starts = range(0, len(self), size)
        return [Lines(*(column[i : i + size] for column in self)) for i in starts]


def index(path: Path) -> dict[Kind, Lines]:
    """Finds every annotation of a file that ``vlm.data.make.spool`` wrote, by its kind.

    Raises:
        DataError: a line is none, so the file was changed.
    """
    found: dict[Kind, tuple[array, array]] = {k: (array("Q"), array("Q")) for k in KINDS}
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file):
            try:
                fields = json.loads(raw)
            except ValueError:
                raise DataError(f"{path}, line {number + 1} is no JSON; {DELETE_IT}") from None
            numbers, offsets = found[kind_of(fields.get("video"), fields.get("images"))]
            numbers.append(number)
            offsets.append(offset)
            offset += len(raw)
    return {kind: Lines(*map(np.asarray, columns)) for kind, columns in found.items()}


def read(file: BinaryIO, lines: Lines) -> Iterator[tuple[int, Annotation]]:
    """The annotations of some lines of an indexed file, with the numbers of the lines.

    Raises:
        DataError: a line is none, so the file was changed.
    """
    for number, offset in zip(lines.numbers.tolist(), lines.offsets.tolist(), strict=True):
        file.seek(offset)
        try:
            yield number, Annotation.model_validate_json(file.readline(MAX_JSON_BYTES + 1))
        except ValidationError as error:
            where = f"{file.name}, line {number + 1}"
            raise DataError(f"{where}: {explain(error)}; {DELETE_IT}") from None


def kind_of(video: str | None, images: Sequence[str] | None) -> Kind:
    if video is not None:
        return "video"
    return "image" if images else "text"
