"""Walks a tar past whatever is wrong with it, so that one fault does not hide the next.

`vlm.data.format.tar` stops at the first fault; this names it and goes on at the next header. What a
refused header describes is skipped whole where its size can be trusted: a tar inside a member must
not be taken for members. Not here: what members may be in a shard (`vlm.data.format.shards`).
"""

from collections.abc import Iterator
from typing import NamedTuple

from vlm.data.format import tar
from vlm.errors import DataError

_CHUNK_BYTES = 1 << 20
#: where the magic of a header stands in it
_MAGIC, _MAGIC_AT = b"ustar", 257


class Damage(NamedTuple):
    """Something that is no member."""

    #: where the last good member ends
    position: int
    text: str


def salvage(read: tar.Read, total: int, where: str) -> Iterator[tar.Member | Damage]:
    """Every member of the tar in bytes [0, ``total``), and between them what is damaged."""
    position = 0
    while True:
        try:
            for member in tar.walk(read, total, where, begin=position):
                yield member
                position = member.end
            return
        except DataError as error:
            text = str(error)
        following = _next_header(read, total, _behind(read, total, position))
        if following is None:
            yield Damage(position, f"{text}; nothing can be read after it")
            return
        yield Damage(position, f"{text}; read on at byte {following}")
        position = following


def _behind(read: tar.Read, total: int, position: int) -> int:
    """The first byte that what is wrong at ``position`` does not own."""
    while True:
        found = tar.probe(read(position, tar.BLOCK))
        if found is None:
            break
        flag, size = found
        end = position + tar.BLOCK + tar.padded(size)
        if size < 0 or end > total:
            break
        position = end
        if flag not in tar.EXTENDED:
            return position
        # an extended header and what it extends go together: without it, the name is not its own
    # the end marker, zeros up to the next header, and bytes that are no header
    return position + tar.BLOCK


def _next_header(read: tar.Read, total: int, position: int) -> int | None:
    """Where the next header is, from a block boundary on."""
    while position < total:
        chunk = bytes(read(position, _CHUNK_BYTES))
        at = chunk.find(_MAGIC, _MAGIC_AT)
        while at >= 0:
            start = at - _MAGIC_AT
            if start % tar.BLOCK == 0 and tar.probe(chunk[start : start + tar.BLOCK]) is not None:
                return position + start
            at = chunk.find(_MAGIC, at + 1)
        position += _CHUNK_BYTES
    return None
