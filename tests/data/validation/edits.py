"""Shards with faults, and reports in brief."""

from pathlib import Path

from tests.data import helpers
from vlm.data.validation.report import Report


def brief(report: Report) -> list[tuple[str, str, str, str, str]]:
    return [(Path(f.shard).name, f.key, f.member, f.check, f.fault) for f in report.faults]


def edited(path: Path, edits: dict[str, bytes | None]) -> Path:
    """The shard with members replaced, or dropped where the new body is None."""
    members = [(n, edits.get(n, b)) for n, b in helpers.tar_members(path)]
    return helpers.write_tar(path, [(n, b) for n, b in members if b is not None])
