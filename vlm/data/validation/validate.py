"""Checks every sample of a set of shards and names every fault.

`vlm.data.manifest.manifest` stops where a shard is damaged; this goes on, so that one run shows all
there is to mend. What happens, in order:

1. Each shard is checked alone, in processes (`check`), past any damage (`salvage`).
2. Shards are compared with each other, the evaluation set and the manifest (`compare`).
3. Faults and statistics are put together (`report`).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from vlm.data.format import shards
from vlm.data.manifest import manifest
from vlm.data.pool import ordered_map
from vlm.data.text import chat
from vlm.data.validation.check import Checks, Task, check_shard
from vlm.data.validation.compare import compare
from vlm.data.validation.report import Fault, Report, ShardReport, Tally, add_source
from vlm.errors import ConfigError, DataError


def validate(
    paths: Sequence[Path],
    checks: Checks | None = None,
    *,
    manifest_path: Path | None = None,
    against: Path | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Checks shards one by one, then against each other.

    Args:
        manifest_path: What the shards must agree with.
        against: Shards, a folder or a manifest of the evaluation set, which must share nothing
            with ``paths``.
        progress: Called with (shards done, shards in all).

    Raises:
        DataError: a manifest cannot be read, or the evaluation set is damaged.
        ConfigError: the tokenizer cannot be used, or is needed and not there.
    """
    checks = checks or Checks()
    if checks.tokenizer is not None:
        chat.load_tokenizer(checks.tokenizer, checks.image_token)
    elif checks.max_tokens is not None:
        raise ConfigError("max_tokens without a tokenizer: nothing counts the tokens; name one")
    listed = manifest.load(manifest_path).shards if manifest_path is not None else None
    held_out = _evaluation_shards(against) if against is not None else []
    tasks = [Task(path, checks, hash=listed is not None) for path in paths]
    # the evaluation set is only read; it has a validation of its own
    tasks += [Task(path, Checks(decode_frac=0.0), hash=False) for path in held_out]
    reports: list[ShardReport] = []
    for report in ordered_map(check_shard, tasks, workers):
        reports.append(report)
        if progress is not None:
            progress(len(reports), len(tasks))
    own, outside = reports[: len(paths)], reports[len(paths) :]
    for report in outside:
        if damage := [fault for fault in report.faults if fault.check == "tar"]:
            raise DataError(
                f"evaluation shard {report.path}: {damage[0].fault}; what leaked cannot be told, "
                "mend it first"
            )
    absent = compare(own, outside, listed, one_size=checks.size is None)
    return _summary(own, [*own, *absent])


def _evaluation_shards(path: Path) -> list[Path]:
    """The shards of a manifest, a folder or a tar.

    Raises:
        DataError: there is none.
    """
    if path.suffix == ".parquet":
        return [info.path for info in manifest.load(path).shards]
    return shards.find_shards([path])


def _summary(own: list[ShardReport], reports: list[ShardReport]) -> Report:
    sources: dict[str, Tally] = {}
    total = Tally()
    faults: list[Fault] = []
    for report in reports:
        for name, tally in report.sources.items():
            add_source(sources, name).update(tally)
            total.update(tally)
        faults += report.faults
        if report.num_dropped_faults:
            text = f"and {report.num_dropped_faults} more faults"
            faults.append(Fault(str(report.path), "", "", "tar", text))
    faulty = {report.path: report.faulty for report in own}
    return Report(
        num_shards=len(own),
        num_bytes=sum(report.num_bytes for report in own),
        num_samples=sum(report.num_samples for report in own),
        num_decoded=sum(report.num_decoded for report in own),
        num_faulty=sum(_num_faulty(report) for report in own),
        total=total,
        sources=sources,
        faults=faults,
        num_allowed=sum((report.num_allowed for report in reports), Counter()),
        faulty=faulty,
    )


def _num_faulty(report: ShardReport) -> int:
    """Samples that a fault names; members that are no sample's are named too."""
    if not report.faulty:
        return 0
    return sum(report.key(row) in report.faulty for row in range(report.num_samples))
