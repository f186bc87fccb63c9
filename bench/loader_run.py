"""One contestant of bench/loader.py in a process of its own: measures it, prints one line of JSON.

    python -m bench.loader_run saccade --data FOLDER --cores 2 --frames 8000

Imports are not counted. What is measured starts after an eighth of the frames, when queues are
full, and ends while they are: nothing is credited that was prepared before, or not yet handed over.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from bench.loader_data import Data
from bench.loader_rivals import CONTESTANTS, Contestant, Stream, Taken

WARM_FRAC = 1 / 8


class Run(NamedTuple):
    first_batch_s: float
    resume_s: float
    samples_per_s: float
    frames_per_s: float
    #: of the process and its workers
    cpu_s_per_1000_frames: float
    rss_mb: float


def measure(contestant: Contestant, data: Data, cores: int, num_frames: int) -> Run:
    """Opens, warms up, measures, and opens again where the first time ended."""
    contestant.load()
    started = time.perf_counter()
    source = Endless(lambda state: contestant.open(data, cores, state))
    source.take(1)
    first_batch_s = time.perf_counter() - started
    source.take(int(WARM_FRAC * num_frames))
    cpu_s, started = _cpu_s(), time.perf_counter()
    taken = source.take(num_frames)
    seconds, cpu_s = time.perf_counter() - started, _cpu_s() - cpu_s
    rss_mb = _rss_mb()
    state = source.stream.state()
    source.close()
    started = time.perf_counter()
    resumed = contestant.open(data, cores, state)
    next(resumed.items)
    resume_s = time.perf_counter() - started
    return Run(
        first_batch_s,
        resume_s,
        taken.num_samples / seconds,
        taken.num_frames / seconds,
        1000 * cpu_s / taken.num_frames,
        rss_mb,
    )


class Endless:
    """A contestant whose epochs follow each other; starting one is on its bill."""

    def __init__(self, start: Callable[[Any], Stream]) -> None:
        self._start = start
        self.stream = start(None)

    def take(self, num_frames: int) -> Taken:
        """What comes until it has so many frames."""
        samples = frames = 0
        while frames < num_frames:
            one = next(self.stream.items, None)
            if one is None:
                self.stream = self._start(None)
                continue
            samples, frames = samples + one.num_samples, frames + one.num_frames
        return Taken(samples, frames)

    def close(self) -> None:
        """Ends a generator; whatever else it is ends with the last reference."""
        close = vars(type(self.stream.items)).get("close")
        if close is not None:
            close(self.stream.items)


def _processes() -> list[psutil.Process]:
    own = psutil.Process()
    return [own, *own.children(recursive=True)]


def _cpu_s() -> float:
    total = 0.0
    for process in _processes():
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            # of workers that have ended, too
            total += times.user + times.system + times.children_user + times.children_system
    return total


def _rss_mb() -> float:
    """What processes share is counted once, in equal parts."""
    total = 0.0
    for process in _processes():
        with suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().pss / 1e6
    return total


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", choices=CONTESTANTS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cores", type=int, required=True)
    parser.add_argument("--frames", type=int, required=True)
    args = parser.parse_args(argv)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    found = measure(CONTESTANTS[args.name], Data(args.data), args.cores, args.frames)
    sys.stdout.write(json.dumps(found._asdict()) + "\n")
    sys.stdout.flush()
    # workers of the stream that was opened last need not be waited for
    for process in _processes()[1:]:
        process.kill()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
