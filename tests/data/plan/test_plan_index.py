import json
from pathlib import Path

import numpy as np
import pytest

from tests.data.random_rows import make_policy, make_rows
from vlm.data.plan import plan_index
from vlm.data.plan.plan import Plan
from vlm.errors import DataError


def make_plan() -> Plan:
    return Plan(make_rows(3000), make_policy(), ["a"])


def test_a_second_search_plans_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make_plan().seek(100)
    assert expected.window > 3
    assert plan_index.seek(make_plan(), 100, tmp_path) == expected
    pairs = json.loads(plan_index.path_of(make_plan(), tmp_path).read_text())
    assert pairs == [[w, len(make_plan().window(w))] for w in range(expected.window + 1)]
    monkeypatch.setattr(Plan, "window", lambda self, index: pytest.fail("planned again"))
    assert plan_index.seek(make_plan(), 100, tmp_path) == expected
    assert plan_index.seek(make_plan(), 7, tmp_path).global_step == 7


def test_a_search_that_is_interrupted_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan_index.seek(make_plan(), 100, tmp_path, stop)
    ends = np.cumsum([len(make_plan().window(w)) for w in range(3)]).tolist()
    assert seen == [(end, 100) for end in ends]
    planned = []
    plan_window = Plan._plan_window
    monkeypatch.setattr(
        Plan, "_plan_window", lambda self, i: (planned.append(i), plan_window(self, i))[1]
    )
    found = plan_index.seek(make_plan(), 100, tmp_path)
    assert planned == list(range(3, found.window + 1))


def test_each_plan_has_its_own(tmp_path: Path) -> None:
    other = Plan(make_rows(3000), make_policy(seed=2), ["a"])
    assert plan_index.path_of(other, tmp_path) != plan_index.path_of(make_plan(), tmp_path)


@pytest.mark.parametrize("text", ["", "[[0]]", "[[0, 0]]", '[["a", 1]]', "[[-1, 3]]", "3"])
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    path = plan_index.path_of(make_plan(), tmp_path)
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(DataError, match=r"plan index .*\.json: .*remove the file"):
        plan_index.seek(make_plan(), 3, tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "plans").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written"):
        plan_index.seek(make_plan(), 3, tmp_path)
