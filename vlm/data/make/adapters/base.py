"""What an adapter is: a function from a data set's published layout to annotations.

    def annotations(root: Path, options: Options) -> Iterator[Annotation | Failure]

It reads metadata only: media stay where they are, named by refs (`vlm.data.make.media`) that worker
processes open later. What cannot be used is yielded as a ``Failure``; an exception is for a layout
that is not there at all (`DataError`). Two calls yield the same in the same order. Most adapters
are ``each(records, make)`` over what `vlm.data.make.adapters.records` reads. Not here: which
adapters there are (`vlm.data.make.adapters.registry`).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from vlm.data.format.schema import explain
from vlm.data.make.adapters.records import Record
from vlm.data.make.annotations import Annotation, Failure
from vlm.errors import SampleError

BAD_RECORD = "bad record"

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """Of an adapter that has none."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One line of the registry."""

    annotations: Callable[[Path, Any], Iterator[Annotation | Failure]]
    #: SPDX identifier where there is one, else a few words; travels with every sample that names
    #: none of its own; empty if only they can know
    licence: str
    help: str
    #: frozen keyword-only dataclass whose fields are made with ``option``
    options: type = NoOptions
    #: data set on the Hugging Face hub that --download fetches; empty if there is none
    hub_id: str = ""
    #: globs of its files
    hub_files: tuple[str, ...] = ("*",)
    #: what else --download fetches, given the root: address, and path below the root
    urls: Callable[[Path], Iterator[tuple[str, str]]] | None = None


def option(help: str, default: Any = MISSING, choices: tuple[Any, ...] = ()) -> Any:
    """A field of an adapter's options, and its command line flag.

    The field's type is str, int, float or Path (an existing file), or ``tuple[str, ...]`` for a
    flag with several values; ``| None`` where the default is None. Without a default the flag is
    required.
    """
    return field(default=default, metadata={"help": help, "choices": choices})


def each(
    records: Iterable[Record | Failure],
    make: Callable[[Record], Iterable[Annotation | Failure]],
) -> Iterator[Annotation | Failure]:
    """What ``make`` makes of every record; a record it cannot use becomes a failure.

    ``make`` may raise SampleError, and may leave validation to ``Annotation``.
    """
    for record in records:
        if isinstance(record, Failure):
            yield record
            continue
        try:
            yield from make(record)
        except ValidationError as error:
            yield failure(record, explain(error))
        except SampleError as error:
            yield failure(record, str(error))


def failure(record: Record, error: str, reason: str = BAD_RECORD) -> Failure:
    return Failure(reason=reason, error=f"{record.where}: {error}")


def want(fields: dict[str, Any], name: str, kind: type[Value]) -> Value:
    """A field of a record that must have this type.

    Raises:
        SampleError: it is missing or of another type.
    """
    value = fields.get(name)
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        found = "nothing" if value is None else type(value).__name__
        raise SampleError(f"`{name}` is {found}; expected {kind.__name__}")
    return value
