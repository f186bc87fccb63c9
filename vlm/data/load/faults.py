"""Bad samples of a run: named in a file, counted, remembered; too many of them stop it.

A row is bad when its bytes are, which every rank finds alike. What replaces it is the plan's to say
(``Plan.substitutes``). Not here: shards that cannot be reached, which are nobody's bad samples
(``vlm.data.storage.storage``).
"""

import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from vlm.data.plan.catalog import Catalog
from vlm.data.storage import remote
from vlm.errors import DataError, one_line

log = logging.getLogger(__name__)

FILE = "bad_samples.jsonl"
#: so few bad samples never stop a run, or its first one would
FREE = 8
_MEMBER = re.compile(r"\bmember ('[^']*'|[^\s:,;]+)")


class Fault(NamedTuple):
    """Why a row was refused."""

    row: int
    message: str


class BadSamples:
    """What one rank found; rows are those of the catalog.

    Args:
        max_frac: Share of replaced samples among those delivered that stops the run.
        path: File to add a line to for each bad row; None for none.
        quarantine: Rows found bad before this process started.
    """

    def __init__(
        self, catalog: Catalog, max_frac: float, path: Path | None, quarantine: Iterable[int] = ()
    ) -> None:
        self._catalog, self._max_frac, self._path = catalog, max_frac, path
        self._rows = set(quarantine)
        self.quarantine = tuple(sorted(self._rows))
        self.num_seen = self.num_replaced = 0

    def __contains__(self, row: int) -> bool:
        return row in self._rows

    def record(self, row: int, stand_in: int, faults: Iterable[Fault], where: str) -> None:
        """One sample was delivered: ``row`` itself, or ``stand_in`` after ``faults``.

        Args:
            where: Rank, epoch and step, for the log.

        Raises:
            DataError: too many samples were bad.
        """
        self.num_seen += 1
        if stand_in == row:
            return
        self.num_replaced += 1
        new = {fault.row: fault for fault in faults if fault.row not in self._rows}
        for fault in new.values():
            self._write(fault, stand_in, where)
        if new:
            self._rows |= new.keys()
            self.quarantine = tuple(sorted(self._rows))
        if self.num_replaced > max(FREE, self._max_frac * self.num_seen):
            raise DataError(
                f"{self.num_replaced} of {self.num_seen} samples are bad, more than "
                f"data.max_bad_frac={self._max_frac:g}; the last: {self._catalog.where(row)}; see "
                f"{self._path or 'the log'} and validate_shards"
            )

    def _write(self, fault: Fault, stand_in: int, where: str) -> None:
        manifest, own = self._catalog.locate(fault.row)
        message = one_line(fault.message)
        member = _MEMBER.search(message)
        log.warning("bad sample, row %d stands in: %s", stand_in, message)
        if self._path is None:
            return
        line = {
            "row": fault.row,
            "shard": remote.display(self._catalog.shards[self._catalog.shard[fault.row]].location),
            "offset": int(manifest.offset[own]),
            "key": self._catalog.key(fault.row),
            "member": member[1].strip("'") if member else None,
            "reason": message,
            "stand_in": stand_in,
            "where": where,
        }
        # one write of a line at the end: ranks share the file
        handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.write(handle, json.dumps(line).encode() + b"\n")
        finally:
            os.close(handle)
