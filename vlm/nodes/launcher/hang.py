"""Whether a job hangs, and which rank is to blame: pure functions of what ranks last said.

Ranks go in step, so that one that waits makes all wait: the job hangs when nobody says anything new
for long. Not here: how ranks say it (``vlm.heartbeat``), who ends the job
(``vlm.nodes.launcher.supervise``).
"""

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from vlm.heartbeat import Beat

#: a step may take so many times the median, and so may an evaluation or a save
TIMES_MEDIAN = 20.0
#: what is no step never gets more, and nothing less if it is not measured
OTHER_S = 1800.0
#: phases that take about as long each time; others happen once or wait for what may take long
MEASURED = ("evaluate", "save")
#: phases of a step in their order: samples are awaited, then trained on
PHASES = ("load", "train")
NUM_STEPS = 50
#: states of a process that runs nothing
HALTED = ("stopped", "disk-sleep", "gone", "tracing-stop")


@dataclass(frozen=True)
class Stack:
    """Of one rank: what the kernel and its interpreter say."""

    state: str
    text: str


class Pulse:
    """What ranks said last.

    Args:
        least_s: without a step, before it may be a hang.
    """

    def __init__(self, num_ranks: int, least_s: float) -> None:
        self._num_ranks, self._least_s = num_ranks, least_s
        self.beats: dict[int, Beat] = {}
        #: when something new was said
        self._new_at = 0.0
        self._step, self._step_at = -1, 0.0
        self._durations: deque[float] = deque(maxlen=NUM_STEPS)
        #: when each rank began what it does
        self._begun: dict[int, float] = {}
        #: measured phase -> how long it took, from its begin to the next phase
        self._took: dict[str, deque[float]] = {}

    def hear(self, rank: int, beat: Beat, now: float) -> None:
        before = self.beats.get(rank)
        if before is None or (before.phase, before.step) != (beat.phase, beat.step):
            if before is not None and before.phase in MEASURED:
                took = self._took.setdefault(before.phase, deque(maxlen=NUM_STEPS))
                took.append(now - self._begun[rank])
            self._begun[rank] = now
        self.beats[rank] = beat
        self._new_at = now
        if beat.phase in PHASES and beat.step > self._step:
            if self._step >= 0:
                steps = beat.step - self._step  # some may have been missed
                self._durations.extend([(now - self._step_at) / steps] * min(steps, NUM_STEPS))
            self._step, self._step_at = beat.step, now

    @property
    def median_s(self) -> float | None:
        return _median(self._durations)

    def silent_s(self, now: float) -> float | None:
        """For how long nothing new was said, if that is too long. None where nobody ever beats."""
        if not self.beats:
            return None
        started = len(self.beats) == self._num_ranks
        phases = {beat.phase for beat in self.beats.values()}
        limit = max(map(self._limit_s, phases)) if started else OTHER_S
        silent = now - self._new_at
        return silent if silent > max(limit, self._least_s) else None

    def _limit_s(self, phase: str) -> float:
        if phase in PHASES:
            return OTHER_S if self.median_s is None else TIMES_MEDIAN * self.median_s
        median_s = _median(self._took.get(phase, ()))
        return OTHER_S if median_s is None else min(OTHER_S, TIMES_MEDIAN * median_s)


def _median(values: Collection[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def blame(beats: Mapping[int, Beat], stacks: Mapping[int, Stack]) -> tuple[int | None, str]:
    """The rank that all wait for, and why it is this one; None: they wait for each other."""
    halted = [r for r, stack in sorted(stacks.items()) if stack.state in HALTED]
    if halted:
        return halted[0], f"its process is {_with_state(stacks[halted[0]].state)}"
    mute = [r for r, stack in sorted(stacks.items()) if not stack.text]
    if mute:
        return mute[0], "it does not answer a signal"
    places = {rank: (beat.step, _order(beat.phase)) for rank, beat in beats.items()}
    if len(set(places.values())) > 1:
        last = min(places, key=lambda rank: (places[rank], rank))
        most = max(beats.values(), key=lambda beat: (beat.step, _order(beat.phase)))
        return last, f"it is behind: others are in {most.phase!r} of step {most.step}"
    return None, "all ranks are at the same place: they wait for each other"


def _order(phase: str) -> int:
    return PHASES.index(phase) if phase in PHASES else len(PHASES)


def _with_state(state: str) -> str:
    return "stopped (SIGSTOP, or a debugger)" if state == "stopped" else state


def describe(beat: Beat | None) -> str:
    """Where a rank was: step, phase and shards."""
    if beat is None:
        return "it never began a step"
    shards = f" with samples of {', '.join(beat.shards)}" if beat.shards else ""
    return f"in {beat.phase!r} of step {beat.step}{shards}"
