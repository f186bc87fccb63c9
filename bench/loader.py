"""Loaders side by side on the same clips, in one interleaved run, beside what decoding alone takes.

    pip install -c constraints.txt -e '.[bench]'
    pip install --no-deps -r bench/rivals.txt
    python bench/loader.py --data /tmp/clips --cores 1 2

Clips of 1 to 32 frames of 224 x 224 pixels in tars, in the page cache. Rivals whose format is
another get the same samples in it, made once. Each run is a process of its own that may use so
many cores and no more; contestants follow each other in every round, so that all meet the same
machine. Shown are medians over rounds, and lowest and highest rate.

`of one core's decoding x cores` is frames a second over what decoding alone does on one core, times
the cores; even threads that only decode stay below it where cores share caches, memory or clock:
`of decoding threads` is over those on the same cores. Both in the same round. CPU seconds depend
less on what else the machine does.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.loader_data import Data, ready
from bench.loader_rivals import CONTESTANTS
from bench.loader_run import Run

TIMEOUT_S = 900
#: decoding alone on one core, in every round
ONE_CORE = "ceiling, one core"


def missing(package: str) -> str:
    """Why a contestant cannot take part; empty if it can."""
    for parent in (package.rpartition(".")[0], package):
        if parent and find_spec(parent) is None:
            return f"{package} is not installed"
    return ""


def prepare(data: Data) -> dict[str, str]:
    """Brings the data into every form; says who cannot take part, and why."""
    absent = {}
    for name, contestant in CONTESTANTS.items():
        done = data.folder / f".{name}"
        if reason := missing(contestant.package):
            absent[name] = reason
        elif not done.exists():
            contestant.prepare(data)
            done.touch()
    return absent


def run(name: str, data: Data, cores: int, frames: int) -> Run:
    command = [sys.executable, "-m", "bench.loader_run", name, "--data", str(data.folder)]
    command += ["--cores", str(cores), "--frames", str(frames)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=True
    )
    return Run(**json.loads(done.stdout.splitlines()[-1]))


def table(cores: int, rounds: list[dict[str, Run]]) -> Table:
    found = Table(
        "loader",
        "samples/s",
        "frames/s",
        "lowest..highest",
        "of one core's decoding x cores",
        "of decoding threads",
        "CPU s/1000 frames",
        "frames/CPU s of ceiling",
        "MB",
        "first batch s",
        "resume s",
        title=f"{cores} cores, {len(rounds)} rounds",
    )
    single = [cores * done[ONE_CORE].frames_per_s for done in rounds]
    for name in rounds[0]:
        if name == ONE_CORE:
            continue
        runs, tops = [done[name] for done in rounds], [done["ceiling"] for done in rounds]
        rates = [one.frames_per_s for one in runs]
        cpu = [one.cpu_s_per_1000_frames for one in runs]
        found.add_row(
            name,
            f"{_median([one.samples_per_s for one in runs]):.0f}",
            f"{_median(rates):.0f}",
            f"{min(rates):.0f}..{max(rates):.0f}",
            f"{_ratio(rates, single):.3f}",
            f"{_ratio(rates, [top.frames_per_s for top in tops]):.3f}",
            f"{_median(cpu):.3f}",
            f"{_ratio([top.cpu_s_per_1000_frames for top in tops], cpu):.3f}",
            *(
                ("-", "-", "-")
                if name == "ceiling"
                else (
                    f"{_median([one.rss_mb for one in runs]):.0f}",
                    f"{_median([one.first_batch_s for one in runs]):.2f}",
                    f"{_median([one.resume_s for one in runs]):.2f}",
                )
            ),
        )
    return found


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def _ratio(rates: Sequence[float], ceilings: Sequence[float]) -> float:
    """By rounds: neighbours in time shared the machine's load."""
    return _median([rate / top for rate, top in zip(rates, ceilings, strict=True)])


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder; made if it is not there")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--frames", type=int, default=12_000, help="measured in each run")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--samples-per-shard", type=int, default=128)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    args = parser.parse_args(argv)
    data = ready(args.data, args.shards, args.samples_per_shard)
    absent = prepare(data)
    names = [name for name in CONTESTANTS if name in {"ceiling", *args.only} - set(absent)]
    for cores in args.cores:
        rounds = []
        for _ in range(args.rounds):
            done = {name: run(name, data, cores, args.frames) for name in names}
            alone = done["ceiling"] if cores == 1 else run("ceiling", data, 1, args.frames)
            rounds.append(done | {ONE_CORE: alone})
        Console(width=160).print(table(cores, rounds))
    for name, reason in absent.items():
        sys.stdout.write(f"absent: {name}: {reason}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
