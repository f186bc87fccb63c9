import hashlib
import random

import numpy as np

from vlm.data.format import digests


def test_where_a_part_ends_matters() -> None:
    assert digests.digest(b"ab", b"c") != digests.digest(b"a", b"bc")
    expected = hashlib.blake2b((3).to_bytes(8, "little") + b"abc", digest_size=16).digest()
    assert digests.digest(b"abc") == expected


def test_equal_rows_are_those_a_dictionary_finds() -> None:
    rng = random.Random(0)
    for size in (0, 1, 2, 50, 500):
        keys = [rng.randrange(max(1, size // 2)) for _ in range(size)]
        values = [digests.digest(str(key).encode()) for key in keys]
        first: dict[bytes, int] = {}
        expected = []
        for i, value in enumerate(values):
            if first.setdefault(value, i) != i:
                expected.append((i, first[value]))
        assert list(digests.equal_rows(digests.as_rows(b"".join(values)))) == expected


def test_half_a_digest_is_not_enough_and_unknown_ones_are_unequal() -> None:
    rows = np.array([[1, 2], [1, 3], [4, 2], [1, 2]], np.uint64)
    assert list(digests.equal_rows(rows)) == [(3, 0)]
    assert list(digests.equal_rows(digests.as_rows(digests.UNKNOWN * 3))) == []
