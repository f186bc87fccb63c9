"""What only several shards together show: doubles, odd sizes, leaks, and what a manifest says.

Works on digests of 16 bytes a sample, sorted, so that millions of samples fit in memory.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from vlm.data.format.digests import equal_rows
from vlm.data.manifest.manifest import ShardInfo
from vlm.data.validation.report import ShardReport, digest_rows


def compare(
    reports: list[ShardReport],
    against: list[ShardReport],
    listed: Sequence[ShardInfo] | None,
    one_size: bool,
) -> list[ShardReport]:
    """Adds faults to the reports.

    Args:
        against: Of the evaluation set.
        listed: The manifest's shards.
        one_size: All frames should have the same.

    Returns:
        Reports of what a manifest lists and is not among ``reports``.
    """
    _doubles(reports)
    if one_size:
        _odd_sizes(reports)
    if against:
        _leaks(reports, against)
    return [] if listed is None else _against_manifest(reports, listed)


def _doubles(reports: list[ShardReport]) -> None:
    where = _Rows(reports)
    for row, first in equal_rows(digest_rows(reports, "key")):
        (report, key), (other, _) = where[row], where[first]
        # in one shard the key's members are not adjacent, which is named already
        if report is not other:
            report.fault("key", key, "", f"the key is also in {other.path}")
    for row, first in equal_rows(digest_rows(reports, "content")):
        (report, key), (other, other_key) = where[row], where[first]
        text = f"the same content as key {other_key} in {other.path}"
        report.fault("content", key, "", text)


def _leaks(reports: list[ShardReport], against: list[ShardReport]) -> None:
    where, held_out = _Rows(reports), _Rows(against)
    rows = digest_rows(reports, "identity")
    outside = digest_rows(against, "identity")
    first = {row.tobytes(): i for i, row in reversed(list(enumerate(outside))) if row.any()}
    # half of each digest finds the few that are worth a look
    for row in np.flatnonzero(np.isin(rows[:, 0], outside[:, 0])):
        found = first.get(rows[row].tobytes())
        if found is None:
            continue
        (report, key), (other, other_key) = where[row], held_out[found]
        text = f"its frames, or text without frames, are key {other_key} of {other.path}"
        report.fault("leak", key, "", text)


def _odd_sizes(reports: list[ShardReport]) -> None:
    """Samples whose frames have not the size that most have: a model takes one."""
    counts: Counter[tuple[int, int]] = Counter()
    for report in reports:
        counts.update(size for size in _sizes(report) if size != (0, 0))
    if len(counts) < 2:
        return
    usual = counts.most_common(1)[0][0]
    for report in reports:
        for row, (h, w) in enumerate(_sizes(report)):
            if (h, w) not in (usual, (0, 0)):
                text = f"frames of {h}x{w}, most have {usual[0]}x{usual[1]}"
                report.fault("size", report.key(row), "", text)


def _sizes(report: ShardReport) -> Iterable[tuple[int, int]]:
    return zip(report.sizes[::2], report.sizes[1::2], strict=True)


def _against_manifest(reports: list[ShardReport], listed: Sequence[ShardInfo]) -> list[ShardReport]:
    infos = {info.path: info for info in listed}
    for report in reports:
        info = infos.pop(report.path, None)
        if info is None:
            text = "not in the manifest"
        elif report.num_bytes != info.bytes:
            text = f"has {report.num_bytes} bytes, {info.bytes} in the manifest"
        elif report.sha256 != info.sha256:
            text = f"its sha256 is {report.sha256}, {info.sha256} in the manifest"
        else:
            continue
        report.fault("manifest", "", "", text)
    absent = [ShardReport(path) for path in infos]
    for report in absent:
        there = report.path.exists()
        text = "in the manifest, but not among the paths" if there else "missing"
        report.fault("manifest", "", "", text)
    return absent


class _Rows:
    """From a row of the joined arrays to its shard and key."""

    def __init__(self, reports: list[ShardReport]) -> None:
        self._reports = reports
        self._ends = np.cumsum([report.num_samples for report in reports])

    def __getitem__(self, row: int | np.integer) -> tuple[ShardReport, str]:
        index = int(np.searchsorted(self._ends, row, side="right"))
        report = self._reports[index]
        return report, report.key(int(row) - int(self._ends[index]) + report.num_samples)
