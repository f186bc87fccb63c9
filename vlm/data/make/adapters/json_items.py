"""Items of a JSON array, one after the other, however large the file is.

Data sets are published as one array of hundreds of megabytes, which as Python objects takes many
times that. Not here: what an item must look like (the adapters).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from vlm.errors import DataError

CHUNK_CHARS = 1 << 20
#: the longest single value that is read, in characters
MAX_ITEM_CHARS = 64 << 20


def json_items(path: Path, key: str | None = None) -> Iterator[Any]:
    """The items of the array that a file holds.

    Bytes that are no UTF-8 become lone surrogates, NaN and infinite numbers become None: both make
    one record unusable, not the file.

    Args:
        key: Of the array in an object; None where the file is the array.

    Raises:
        DataError: the file cannot be read, is damaged, or holds no such array.
    """
    try:
        # some are published with a byte order mark
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            stream = _Stream(file)
            if key is not None:
                _enter(stream, key)
            yield from _items(stream)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; expected a JSON file") from None
    except (_NotJSONError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        wanted = "an array" if key is None else f"an object with the array {key!r}"
        raise DataError(f"{path}: {reason}; expected {wanted}, download it again") from None


class _NotJSONError(Exception):
    """What was found instead, and where."""


class _Stream:
    """A JSON text, of which one value at a time is in memory."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.text = ""
        self.at = 0
        #: characters before ``text``
        self.passed = 0
        self.decoder = json.JSONDecoder(parse_constant=lambda _: None, parse_int=_int)

    def fill(self) -> bool:
        """Reads on; False at the end."""
        left = len(self.text) - self.at
        # twice as much every time, so that a long value is not decoded again and again
        more = self.file.read(max(CHUNK_CHARS, left))
        self.passed += self.at
        self.text = self.text[self.at :] + more
        self.at = 0
        return bool(more)

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.fill():
                return ""

    def take(self, wanted: str) -> str:
        """Passes one of the ``wanted`` characters."""
        found = self.peek()
        if not found or found not in wanted:
            raise self.fault(f"found {found!r}" if found else "it ends")
        self.at += 1
        return found

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
                # a number may go on in what was not read yet
                if end < len(self.text) or not self.fill():
                    self.at = min(end, len(self.text))
                    return value
            except json.JSONDecodeError as error:
                # what is not closed yet and what is broken look the same
                if len(self.text) - self.at > MAX_ITEM_CHARS or not self.fill():
                    raise self.fault(error.msg) from None

    def fault(self, what: str) -> _NotJSONError:
        return _NotJSONError(f"{what} at character {self.passed + self.at}")


def _int(digits: str) -> int | None:
    # Python refuses to convert thousands of digits
    return int(digits) if len(digits) <= 30 else None


def _items(stream: _Stream) -> Iterator[Any]:
    stream.take("[")
    if stream.peek() == "]":
        stream.take("]")
        return
    while True:
        yield stream.value()
        if stream.take(",]") == "]":
            return


def _enter(stream: _Stream, key: str) -> None:
    """Passes everything in the object up to the value of ``key``."""
    stream.take("{")
    while stream.peek() == '"':
        name = stream.value()
        stream.take(":")
        if name == key:
            return
        if stream.peek() == "[":
            for _ in _items(stream):
                pass
        else:
            stream.value()
        if stream.take(",}") == "}":
            break
    raise stream.fault(f"no key {key!r}")
