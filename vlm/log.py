"""Logging: one logger per module, set up once by an entry point, quiet on all ranks but the first.

Library modules do ``log = logging.getLogger(__name__)`` and nothing else at import.
"""

import logging
import os

FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"


class _RankFilter(logging.Filter):
    """Lets ranks other than 0 speak only from WARNING on, and marks what they say."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        if self.rank == 0:
            return True
        if record.levelno < logging.WARNING:
            return False
        record.name = f"rank {self.rank} {record.name}"
        return True


def setup(level: int = logging.INFO) -> None:
    """Installs one stderr handler for ``vlm``. Safe to call twice."""
    root = logging.getLogger("vlm")
    if root.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(FORMAT, datefmt="%H:%M:%S"))
    handler.addFilter(_RankFilter(int(os.environ.get("RANK", "0"))))
    root.addHandler(handler)
    root.setLevel(level)
    root.propagate = False
