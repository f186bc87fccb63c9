"""Digests of 16 bytes that tell samples apart, and finding equal ones among millions.

An array of them takes 16 bytes a sample, where a set of strings takes a hundred.
"""

import hashlib
from collections.abc import Iterator

import numpy as np

DIGEST_BYTES = 16
#: of what cannot be told apart; equal to nothing
UNKNOWN = bytes(DIGEST_BYTES)


def digest(*parts: bytes) -> bytes:
    """Of the parts in their order; where one ends matters."""
    found = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.digest()


def as_rows(digests: bytes | bytearray) -> np.ndarray:
    """(N, 2) uint64 of N digests."""
    return np.frombuffer(bytes(digests), np.uint64).reshape(-1, 2)


def equal_rows(rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """(row, first row that is equal) for each row that is not the first of its kind, in order.

    Args:
        rows: (N, 2) uint64.
    """
    order = np.lexsort((rows[:, 1], rows[:, 0]))  # stable: the first row stays first
    ordered = rows[order]
    repeats = np.zeros(len(order), bool)
    repeats[1:] = (ordered[1:] == ordered[:-1]).all(axis=1) & ordered[1:].any(axis=1)
    starts = np.maximum.accumulate(np.where(repeats, 0, np.arange(len(order))))
    found = np.flatnonzero(repeats)
    later, first = order[found], order[starts[found]]
    for i in np.argsort(later):
        yield int(later[i]), int(first[i])
