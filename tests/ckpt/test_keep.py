from pathlib import Path

from tests.ckpt.folders import make_checkpoint, names, unfinished
from vlm.ckpt.keep import COMPLETE, Keep, kept, prune


def test_the_last_the_best_and_every_so_many_stay() -> None:
    steps = range(10, 130, 10)
    assert kept(steps, 120, None, Keep(2)) == {110, 120}
    assert kept(steps, 120, 30, Keep(2)) == {30, 110, 120}
    assert kept(steps, 120, 30, Keep(2, best=False)) == {110, 120}
    assert kept(steps, 120, 30, Keep(1, every=50)) == {30, 50, 100, 120}
    assert kept(steps, 120, 25, Keep(1)) == {120}  # the best is gone already
    assert kept([120], 120, 120, Keep(3, every=7)) == {120}


def test_what_kills_left_is_cleared(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        make_checkpoint(tmp_path, step)
    (tmp_path / "step_00000020" / COMPLETE).unlink()  # killed while it was pruned
    unfinished(make_checkpoint(tmp_path, 35))
    (tmp_path / "latest").write_text("step_00000040")
    prune(tmp_path, 40, None, Keep(2))
    assert names(tmp_path) == ["latest", "step_00000030", "step_00000040"]
    prune(tmp_path, 40, None, Keep(9))
    assert names(tmp_path) == ["latest", "step_00000030", "step_00000040"]


def test_the_one_just_saved_always_stays(tmp_path: Path) -> None:
    """Step 40 was damaged, so the run went on from 20 and has now saved 25."""
    for step in (20, 25, 40):
        make_checkpoint(tmp_path, step)
    prune(tmp_path, 25, None, Keep(1))
    assert names(tmp_path) == ["step_00000025"]
