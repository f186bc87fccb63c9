"""Which checkpoints a run keeps, and the removal of the others."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from vlm.ckpt.files import TEMPORARY, remove

#: marks a checkpoint that is whole; the last file that is written into it
COMPLETE = "COMPLETE"


@dataclass(frozen=True)
class Keep:
    """The newest ``last``, every ``every``-th step (0: none of them), and the best."""

    last: int
    every: int = 0
    best: bool = True


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def kept(steps: Collection[int], newest: int, best: int | None, keep: Keep) -> set[int]:
    """Steps whose checkpoints stay, of those that there are.

    One after ``newest`` is of an abandoned future: it was damaged when the run resumed before it.
    """
    past = sorted(step for step in steps if step <= newest)
    chosen = set(past[-keep.last :])
    if keep.every:
        chosen |= {step for step in past if step % keep.every == 0}
    if keep.best and best in past:
        chosen.add(best)
    return chosen


def prune(folder: Path, newest: int, best: int | None, keep: Keep) -> None:
    """Removes finished checkpoints that need not stay, and all that kills left behind."""
    finished = {int(p.name.removeprefix("step_")): p for p in finished_in(folder)}
    stay = {finished[step] for step in kept(finished, newest, best, keep)}
    for old in set(folder.glob("step_*")) - stay:
        remove(old, COMPLETE)


def finished_in(folder: Path) -> list[Path]:
    """Those that were published, oldest first; whether they are whole still is another question."""
    return sorted(
        marker.parent
        for marker in folder.glob(f"step_*/{COMPLETE}")
        if marker.parent.suffix != TEMPORARY and marker.parent.name[len("step_") :].isdigit()
    )
