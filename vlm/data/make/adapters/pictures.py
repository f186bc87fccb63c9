"""Records with the images they are about, in Parquet or in folders and archives beside them.

An image in a table stays where it is: its cell becomes a ``Picture``, a ref and a hash of the
bytes. The hash is what splits go by, because data sets repeat an image in many rows and under
many names. Not here: what other fields mean (the adapters), opening refs (`vlm.data.make.media`).
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from vlm.data.format.schema import Turn, explain
from vlm.data.make.adapters import records
from vlm.data.make.adapters.base import failure
from vlm.data.make.adapters.records import Record
from vlm.data.make.annotations import Annotation, Failure
from vlm.errors import DataError, SampleError

#: which of an image's captions become samples
CAPTIONS = ("first", "random", "all")


class Row(BaseModel):
    """The fields of a record that an adapter reads; others are let pass."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


AnyRow = TypeVar("AnyRow", bound=Row)


class Picture(Row):
    """An image of a table."""

    ref: str
    #: blake2b of the file's bytes: the same for the same image, wherever it is
    key: str

    @model_validator(mode="before")
    @classmethod
    def _not_empty(cls, cell: Any) -> Any:
        if cell is None:
            raise ValueError("the image is empty")
        return cell


def table(
    root: Path, patterns: Sequence[str], columns: Sequence[str] | None
) -> Iterator[Record | Failure]:
    """The rows of Parquet files below ``root``; image cells have become pictures, or None.

    ``where`` of a record is ``FILE!ROW``, which is unique in the data set.

    Args:
        columns: Those that there must be, and are read; None for all there are.

    Raises:
        DataError: there is no such file, or one is damaged or lacks a column.
    """
    for path in records.find(root, *patterns):
        name = path.relative_to(root).as_posix()
        for record in records.read(path, columns):
            if isinstance(record, Failure):
                yield record
                continue
            if missing := [column for column in columns or () if column not in record.fields]:
                raise DataError(
                    f"{path}: no column {', '.join(missing)}; found {', '.join(record.fields)}"
                )
            where = f"{name}!{record.row}"
            fields = {k: _picture(f"{where}/{k}", v) for k, v in record.fields.items()}
            yield Record(where, record.row, fields)


def _picture(ref: str, cell: Any) -> Any:
    """What an image cell is replaced by; other cells stay as they are."""
    if isinstance(cell, list):
        return [_picture(f"{ref}/{i}", item) for i, item in enumerate(cell)]
    # the `datasets` package stores {bytes, path}, img2dataset bytes alone
    if isinstance(cell, dict) and "bytes" in cell:
        cell = cell["bytes"]
    if isinstance(cell, bytes):
        return {"ref": ref, "key": hashlib.blake2b(cell, digest_size=16).hexdigest()}
    return cell


def find_folder(root: Path, names: Sequence[str]) -> str:
    """The prefix of refs to images in the first of these places that is there.

    Args:
        names: Below ``root``: ``train2017`` is a folder, ``train2017.zip!train2017`` one in an
            archive, ``images.zip!`` the top of one.

    Raises:
        DataError: none is there.
    """
    for name in names:
        path, is_archive, inner = name.partition("!")
        if (root / path).is_file() if is_archive else (root / path).is_dir():
            return name if is_archive and not inner else f"{name}/"
    raise DataError(f"{root}: holds neither {' nor '.join(names)}; expected the images there")


def typed(
    found: Iterable[Record | Failure], model: type[AnyRow]
) -> Iterator[tuple[Record, AnyRow] | Failure]:
    """The records as rows of ``model``; those that are none become failures."""
    for record in found:
        if isinstance(record, Failure):
            yield record
            continue
        try:
            yield record, model.model_validate(record.fields)
        except ValidationError as error:
            yield failure(record, explain(error))


def question(prompt: str, answer: str, task: str | None = None) -> tuple[Turn, Turn]:
    """One exchange of a conversation."""
    return Turn(role="user", content=prompt), Turn(role="assistant", content=answer, task=task)


def pick_captions(captions: Sequence[str], how: str, identity: str) -> list[tuple[int, str]]:
    """The captions of an image that become samples, with their places among all of them.

    Args:
        how: One of ``CAPTIONS``; ``random`` draws by ``identity``, the same every time.

    Raises:
        SampleError: no caption says anything.
    """
    numbered = [(i, caption) for i, caption in enumerate(captions) if caption.strip()]
    if not numbered:
        raise SampleError("no caption")
    if how == "all":
        return numbered
    if how == "first":
        return numbered[:1]
    digest = hashlib.blake2b(identity.encode(), digest_size=8).digest()
    return [numbered[int.from_bytes(digest) % len(numbered)]]


def captioned(
    source: str, name: str, ref: str, key: str, captions: Sequence[str], how: str
) -> Iterator[Annotation]:
    """The samples of one image and its captions; each knows all of them, as references.

    Args:
        name: Of the image in its data set.
        key: What splits go by.
        how: One of ``CAPTIONS``.
    """
    for number, caption in pick_captions(captions, how, key):
        yield Annotation(
            id=f"{name}#{number}",
            source=source,
            split_key=key,
            images=(ref,),
            caption=caption,
            meta={"captions": list(captions)} if len(captions) > 1 else {},
        )
