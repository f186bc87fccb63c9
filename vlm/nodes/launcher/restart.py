"""Whether a job that ended is started again, when, and on what: pure decisions.

Not here: who carries them out (``vlm.nodes.launcher.launcher``).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vlm.errors import EXIT_PREEMPTED, EXIT_USER_ERROR
from vlm.nodes.hosts.verdict import Verdict
from vlm.nodes.launcher.connection import Place
from vlm.nodes.launcher.outcome import Outcome

#: between restarts: doubled each time, from the first to the longest
FIRST_WAIT_S, LONGEST_WAIT_S = 5.0, 300.0
#: an attempt that was shorter and preempted is followed by a wait as well
SHORT_S = 60.0


@dataclass(frozen=True)
class Decision:
    """``wait_s`` None: the job is over."""

    wait_s: float | None
    why: str


class Restarts:
    """Counts them.

    Args:
        limit: of those that something failed before; preemptions are not counted.
        max_s: of one attempt, after which its ranks leave by themselves; None: they do not.
    """

    def __init__(self, limit: int, max_s: float | None) -> None:
        self._limit, self._max_s = limit, max_s
        self.num_failures = 0
        self.num_preemptions = 0

    def after(self, outcome: Outcome, lasted_s: float, *, asked: bool) -> Decision:
        """
        Args:
            asked: somebody told the launcher to stop.
        """
        if outcome.code == 0:
            return Decision(None, "all ranks have ended well")
        if asked:
            return Decision(None, "stopped as asked")
        if outcome.code == EXIT_USER_ERROR:
            return Decision(None, "a mistake that no restart mends")
        if outcome.code == EXIT_PREEMPTED:
            if self._max_s is not None and lasted_s >= self._max_s:
                return Decision(None, "its time limit is over")
            self.num_preemptions += 1
            wait_s = 0.0 if lasted_s >= SHORT_S else FIRST_WAIT_S
            return Decision(wait_s, "preempted, with all work saved; not counted")
        return self.after_failure()

    def after_failure(self) -> Decision:
        if self.num_failures >= self._limit:
            return Decision(None, f"{self._limit} restarts are used up")
        wait_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**self.num_failures)
        self.num_failures += 1
        return Decision(wait_s, f"restart {self.num_failures} of at most {self._limit}")


def world_size(num_slots: int, micro_batches: int | None) -> int:
    """The most ranks on so many slots that share a step's micro-batches evenly.

    Args:
        micro_batches: of a global step; None: any number of ranks will do.
    """
    if micro_batches is None:
        return num_slots
    return next((n for n in range(num_slots, 0, -1) if micro_batches % n == 0), 0)


def places(found: Sequence[Verdict], micro_batches: int | None) -> list[Place]:
    """Ranks on the hosts that passed, in their order; a host too many gets none."""
    good = [verdict for verdict in found if verdict.ok]
    left = world_size(sum(verdict.host.slots for verdict in good), micro_batches)
    chosen = []
    for verdict in good:
        num_ranks = min(left, verdict.host.slots)
        left -= num_ranks
        if num_ranks:
            address = verdict.facts["address"]
            chosen.append(Place(verdict.host, num_ranks, address, verdict.iface))
    return chosen
