"""Clean copies of shards: what a validation faulted is left out, and a list says what and why.

    FOLDER/video-00000.tar    the good samples, byte for byte; absent if there is none
    FOLDER/left_out.jsonl     one line for every fault

Faults of whole shards (damage, a manifest that does not fit) are listed too; what is left of such a
shard is copied. Not here: finding faults (`vlm.data.validation.validate`).
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm.data.format import shards
from vlm.data.format.rewrite import ShardCopy
from vlm.data.pool import ordered_map
from vlm.data.validation.check import runs
from vlm.data.validation.report import Report, ShardReport
from vlm.errors import DataError

LIST_FILE = "left_out.jsonl"


@dataclass(frozen=True)
class Summary:
    num_samples: int
    num_left_out: int
    num_shards: int


@dataclass(frozen=True)
class _Task:
    source: Path
    output: Path
    left_out: frozenset[str]


def quarantine(
    paths: Sequence[Path],
    report: Report,
    folder: Path,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Writes the samples of ``paths`` that ``report`` does not fault.

    Args:
        paths: What was validated; below ``folder`` they keep their place below their common folder.
        progress: Called with (shards done, shards in all).

    Raises:
        DataError: the folder is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder}: is not empty; name a new folder for the clean shards")
    folder.mkdir(parents=True, exist_ok=True)
    common = os.path.commonpath([path.parent for path in paths])
    tasks = [
        _Task(path, folder / path.relative_to(common), frozenset(report.faulty[path]))
        for path in paths
    ]
    counts = []
    for count in ordered_map(_copy_clean, tasks, workers):
        counts.append(count)
        if progress is not None:
            progress(len(counts), len(tasks))
    _write_list(folder / LIST_FILE, report)
    num_samples = sum(counts)
    return Summary(
        num_samples=num_samples,
        num_left_out=report.num_samples - num_samples,
        num_shards=sum(count > 0 for count in counts),
    )


def _copy_clean(task: _Task) -> int:
    """Number of samples in the clean copy; none makes no copy."""
    # what is faulty by its place in the tar alone is in the report already
    scratch = ShardReport(task.source)
    with shards.open_shard(task.source) as shard:
        good = [members for key, members in runs(shard, scratch) if key not in task.left_out]
        if not good:
            return 0
        with ShardCopy(task.output) as copy:
            for members in good:
                for member in members.values():
                    length = member.end - member.start
                    copy.copy(shard.read, member.start, length, str(task.source))
    return len(good)


def _write_list(path: Path, report: Report) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="ascii") as file:
        file.writelines(json.dumps(fault._asdict()) + "\n" for fault in report.faults)
    shards.publish(temporary, path)
