import re

import pytest

from vlm.data.storage.waits import Waits


def test_the_longest_wait_is_named() -> None:
    waits = Waits()
    assert "no shard" in waits.describe()
    with waits.on("shard a"), waits.on("shard b"):
        assert re.fullmatch(r"shard a, for \d+ s \(and 1 more reads\)", waits.describe())
    assert "no shard" in waits.describe()
    with pytest.raises(KeyError), waits.on("shard c"):
        raise KeyError
    assert "no shard" in waits.describe()
