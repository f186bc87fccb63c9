"""How many steps each window of a plan has, kept in a file: any step is found without planning.

A run writes it as its windows end, and whoever seeks adds what it had to count. It only saves time:
without the file all is found by planning. Not here: the plan itself (``vlm.data.plan.plan``).
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

from vlm.data.plan.plan import Plan
from vlm.data.plan.position import Position
from vlm.errors import DataError


def path_of(plan: Plan, folder: Path) -> Path:
    """The file of a plan in the folder of a run."""
    return folder / "plans" / f"{plan.plan_id}.json"


def seek(
    plan: Plan,
    global_step: int,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> Position:
    """Where a step lies; windows before it that the file does not know are planned, once: a search
    that is interrupted goes on where it was.

    Args:
        progress: Called with (steps passed, ``global_step``) after each window.

    Raises:
        DataError: the file is damaged.
    """
    load(plan, folder)
    known = len(plan.num_steps)
    try:
        return plan.seek(global_step, progress)
    finally:
        if len(plan.num_steps) > known:
            save(plan, folder)


def load(plan: Plan, folder: Path) -> None:
    """Tells the plan what the file knows, if there is one."""
    path = path_of(plan, folder)
    if not path.is_file():
        return
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"))
        counts = {int(window): int(num_steps) for window, num_steps in pairs}
        if min(counts, default=0) < 0 or min(counts.values(), default=1) < 1:
            raise ValueError("found a count below 1")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(
            f"plan index {path}: {error}; expected [window, steps] pairs; remove the file, it is "
            "made again"
        ) from None
    plan.num_steps.update(counts)


def save(plan: Plan, folder: Path) -> None:
    """Replaces the file by all that the plan knows."""
    path = path_of(plan, folder)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(sorted(dict(plan.num_steps).items())), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise DataError(
            f"plan index {path}: cannot be written: {error.strerror}; expected output_dir to be a "
            "folder that can be written"
        ) from None
