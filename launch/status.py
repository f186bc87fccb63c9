"""Shows a job that launch/run.py has started: python launch/status.py runs/NAME/launch

--follow stays until the job ends and returns its exit code: a table on a terminal, else the
timeline; Ctrl-C leaves the job alone. --stop ends it with a checkpoint. Exit codes: the job's
where it has ended, 1 where its launcher was killed, 2 a mistake.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from vlm.errors import EXIT_FAULTS, command
from vlm.nodes.launcher import folder, status
from vlm.nodes.launcher.status import Timeline

EVERY_S = 1.0


def main(argv: Sequence[str]) -> int:
    args = _parse(argv)
    if args.stop:
        folder.stop(args.job)
    state = folder.read(args.job)
    console, timeline = Console(file=sys.stdout, highlight=False), Timeline(args.job)
    timeline.skip()
    if not args.follow:
        console.print(status.table(state, time.time(), list(timeline.last)))
    elif console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            for state in _states(args.job):
                list(timeline.new())
                live.update(status.table(state, time.time(), list(timeline.last)), refresh=True)
    else:
        for _ in _states(args.job):
            for line in timeline.new():
                sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
    state = folder.read(args.job)
    if folder.alive(state):
        return 0
    return EXIT_FAULTS if state["exit_code"] is None else state["exit_code"]


def _states(job: Path) -> Iterator[dict[str, Any]]:
    """Of a job until it ends; each is read before its lines, so that none comes after the end."""
    state = folder.read(job)
    while folder.alive(state):
        yield state
        time.sleep(EVERY_S)
        state = folder.read(job)
    yield state


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", type=Path, help="the folder that launch/run.py named")
    parser.add_argument("--follow", action="store_true", help="until the job ends")
    parser.add_argument("--stop", action="store_true", help="end the job, with a checkpoint")
    return parser.parse_args(argv)


if __name__ == "__main__":
    command(main)()
