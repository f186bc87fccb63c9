from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.make.adapters.published import sort_out, texts, write_parquet
from vlm.data.make.adapters import smoltalk
from vlm.data.make.adapters.smoltalk import Options
from vlm.errors import DataError


def row(number: int, *roles: str) -> dict[str, Any]:
    said = roles or ("user", "assistant", "user", "assistant")
    return {
        "messages": [{"content": f"{role} {number}", "role": role} for role in said],
        "source": "smol-magpie-ultra",
    }


def write(root: Path, rows: list[dict[str, Any]], name: str = "train-00000-of-00001") -> Path:
    return write_parquet(root / "data" / "all" / f"{name}.parquet", rows)


def test_stages_share_the_rows_without_overlap(tmp_path: Path) -> None:
    rows = [row(i) for i in range(70)]
    write(tmp_path, rows[:40], "train-00000-of-00002")
    write(tmp_path, rows[40:], "train-00001-of-00002")
    write(tmp_path, rows, "test-00000-of-00001")
    drawn = []
    for stage, count in ((1, 40), (2, 20), (3, 10)):
        found, failures = sort_out(smoltalk.annotations(tmp_path, Options(stage=stage)))
        assert (len(found), failures) == (count, [])
        drawn += [int(texts(a)[0][1].removeprefix("user ")) for a in found]
        assert {a.meta["loss_on"] for a in found} == {"all" if stage == 1 else "answers"}
        assert {a.meta["stage"] for a in found} == {stage}
    assert sorted(drawn) == list(range(70))


def test_of_the_whole_set_stages_take_their_targets() -> None:
    masks = smoltalk.draw(1_043_917)
    assert [int(mask.sum()) for mask in masks] == [280_000, 140_000, 70_000]
    assert int(np.sum(masks, axis=0).max()) == 1
    # spread over all of it, not the first ones
    assert np.abs(np.flatnonzero(masks[2]).mean() / 1_043_917 - 0.5) < 0.01


def test_every_turn_is_kept(tmp_path: Path) -> None:
    roles = ("system", "user", "assistant", "user", "assistant")
    write(tmp_path, [row(i, *roles) for i in range(7)])
    found, _ = sort_out(smoltalk.annotations(tmp_path, Options(stage=1)))
    assert len(found) == 4
    for annotation in found:
        assert [role for role, _ in texts(annotation)] == list(roles)
        assert annotation.kind == "text"
        assert annotation.meta["subset"] == "smol-magpie-ultra"


def test_conversations_that_are_none_become_failures(tmp_path: Path) -> None:
    bad = [
        row(0, "user"),
        row(0, "user", "user", "assistant"),
        row(0, "user", "robot"),
        {"messages": None, "source": "x"},
        {"messages": [{"content": None, "role": "user"}], "source": "x"},
        {"messages": [{"content": "a <video>", "role": "user"}], "source": None},
        row(0, "user", "assistant"),
    ]
    write(tmp_path, bad)
    failures = []
    num_found = 0
    for stage in (1, 2, 3):
        some, others = sort_out(smoltalk.annotations(tmp_path, Options(stage=stage)))
        num_found += len(some)
        failures += others
    assert (num_found, len(failures)) == (1, 6)
    assert all("data/all/train-00000-of-00001.parquet!" in f.error for f in failures)


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no data/all/train-\*\.parquet"):
        list(smoltalk.annotations(tmp_path, Options(stage=1)))
    write(tmp_path, [row(1)]).write_bytes(b"no parquet")
    with pytest.raises(DataError, match="cannot be read"):
        list(smoltalk.annotations(tmp_path, Options(stage=1)))
