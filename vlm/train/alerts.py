"""Who is told what the health monitor found: console, ``alerts.jsonl``, W&B; and the record of
incidents, ``incidents.jsonl``: steps that were left out, taken back or ran out of memory, with the
keys of their samples.

Both files only grow: a resume or a rollback takes back steps, not what happened. Not here: what an
alert is raised for (``vlm.train.health``).
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from vlm import dist
from vlm.train.health import Alert
from vlm.train.portable import dumps

log = logging.getLogger(__name__)

ALERTS = "alerts.jsonl"
INCIDENTS = "incidents.jsonl"
LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "critical": logging.ERROR}


class Alerts:
    """The alert files of one run, written by rank 0; on other ranks every method does nothing.

    Args:
        view: shows an alert elsewhere, too (W&B).
    """

    def __init__(self, run_dir: Path, view: Callable[[Alert], None]) -> None:
        self._run_dir, self._view = run_dir, view
        self.num_alerts = self.num_incidents = 0

    def tell(self, alerts: Iterable[Alert]) -> None:
        for alert in alerts:
            self.num_alerts += 1
            if not dist.is_main():
                continue
            log.log(
                LEVELS[alert.severity],
                "[HEALTH] step %d: %s: %s",
                *(alert.step, alert.check, alert.message),
            )
            _append(self._run_dir / ALERTS, alert._asdict())
            self._view(alert)

    def incident(self, step: int, what: str, action: str, **details: Any) -> None:
        """Records a step that did not go as planned."""
        self.num_incidents += 1
        if dist.is_main():
            if action != "warn":  # else the alert has said all, and not more often than it should
                log.warning("step %d: %s; %s", step, what, action)
            row = {"step": step, "what": what, "action": action, **details}
            _append(self._run_dir / INCIDENTS, row)


def _append(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(dumps({"time": round(time.time(), 3), **row}) + "\n")
