"""``run_summary.json``: how a run ended, with what, and what came of it.

It says "running" from the start on, and what was last known at each checkpoint: a run that was
killed is one that is not running and says it is. Not here: the numbers of each step
(``vlm.train.metrics``).
"""

import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vlm import dist
from vlm.ckpt.files import replace_text
from vlm.errors import one_line
from vlm.train.portable import dumps

SUMMARY = "run_summary.json"
PACKAGES = ("deepspeed", "numpy", "torch", "transformers")
SOURCE = Path(__file__).parents[2]


class RunSummary:
    """``with RunSummary(...) as summary: ... summary.update(...); summary.status = "finished"``.

    Rank 0 writes; on other ranks every method does nothing.

    Args:
        about: what the run is: its name, files, ranks, price.
    """

    def __init__(self, run_dir: Path, about: dict[str, Any]) -> None:
        self._path = run_dir / SUMMARY
        #: "running", or how the run ended
        self.status = "running"
        self._values = {
            **about,
            "started": _now(),
            "git": git_state(SOURCE) if dist.is_main() else None,
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in PACKAGES},
            },
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "error": None,
        }

    def update(self, values: dict[str, Any]) -> None:
        """Adds what is known by now, and writes."""
        self._values |= values
        self._write()

    def __enter__(self) -> "RunSummary":
        self._write()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            self._values["error"] = f"{type(error).__name__}: {one_line(error)}"
        self._write()

    def _write(self) -> None:
        if dist.is_main():
            values = {"status": self.status, "updated": _now(), **self._values}
            replace_text(self._path, dumps(values, indent=1))


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit of a source folder, and whether files differ from it; None without git."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": bool(changed)}


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=10
    ).stdout.strip()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
