import numpy as np
import pytest

from vlm.ckpt.interval import best_interval_s


@pytest.mark.parametrize(("save_s", "mtbf_s"), [(1.0, 3600.0), (60.0, 4 * 3600.0)])
def test_no_other_interval_costs_less(save_s: float, mtbf_s: float) -> None:
    """Against a search over intervals: time lost to saves and to half an interval a failure."""
    intervals = np.linspace(save_s, mtbf_s, 200_000)
    lost_frac = save_s / intervals + intervals / 2 / mtbf_s
    assert best_interval_s(save_s, mtbf_s) == pytest.approx(intervals[lost_frac.argmin()], rel=0.01)


def test_saving_never_fills_the_time() -> None:
    assert best_interval_s(100.0, 10.0) == 100.0
