"""How often to save: often enough to lose little, seldom enough to pay little."""

import math


def best_interval_s(save_s: float, mtbf_s: float) -> float:
    """Young's first-order optimum, sqrt(2 save_s mtbf_s), which Daly refined.

    Saving every T costs save_s / T of the time, a failure costs T / 2 on average; the sum is
    smallest here. It holds while a save takes much less than the time between failures, and is
    never shorter than the save itself.

    Args:
        save_s: seconds for which training stands still.
        mtbf_s: mean seconds between failures or preemptions of the whole job.
    """
    return max(save_s, math.sqrt(2 * save_s * mtbf_s))
