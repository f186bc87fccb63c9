"""Where a run stands in its plan: all that a checkpoint keeps of the data, the same on all ranks.

Not here: the plan (``vlm.data.plan.plan``), and who replaces samples (the loader).
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from vlm.errors import CheckpointError


@dataclass(frozen=True)
class Position:
    """Where the next step lies."""

    window: int = 0
    #: of the window
    step: int = 0
    #: steps before it in all windows; it says when ``data.weights_at`` takes effect
    global_step: int = 0


@dataclass(frozen=True, kw_only=True)
class LoaderState:
    """About 150 bytes: a position, whose it is, and which rows others stand in for."""

    plan_id: str
    epoch: int
    window: int
    step: int
    global_step: int
    #: rows found bad, ascending; each is replaced by the first good one of its substitutes
    quarantine: tuple[int, ...] = ()

    @property
    def position(self) -> Position:
        return Position(self.window, self.step, self.global_step)

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "quarantine": list(self.quarantine)}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> "LoaderState":
        """Raises CheckpointError where ``found`` is not what ``to_dict`` returns."""
        names = {field.name for field in dataclasses.fields(cls)}
        if set(found) != names:
            raise CheckpointError(
                f"loader state: found the keys {', '.join(sorted(map(str, found)))}; expected "
                f"{', '.join(sorted(names))}; it was written by another version"
            )
        rows = found["quarantine"]
        counts = [found[name] for name in ("epoch", "window", "step", "global_step")]
        whole = isinstance(rows, list) and all(_is_count(n) for n in [*counts, *rows])
        if not whole or not isinstance(found["plan_id"], str) or rows != sorted(set(rows)):
            raise CheckpointError(
                f"loader state {found}: expected a plan_id, whole numbers from 0 up, and "
                "quarantined rows in ascending order; the checkpoint is damaged, take another"
            )
        return cls(**{**found, "quarantine": tuple(rows)})


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
