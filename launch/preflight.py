"""Checks the hosts of a hostfile before a run is paid for: one line for each, and why.

python launch/preflight.py --hostfile hostfile --recipe recipes/R.yaml

Start it in the checkout; the same path has to hold it on every host. DS_ACCELERATOR=cpu checks
hosts that have no GPU. Exit code 0: all pass, 1: one does not, 2: misuse.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vlm import config, errors
from vlm.nodes.hosts import hostfile
from vlm.nodes.hosts.verdict import Verdict, line
from vlm.train import hosts


def main(argv: Sequence[str]) -> int:
    args = _parse(argv)
    listed = hostfile.read(args.hostfile)
    recipe = None if args.recipe is None else config.load(args.recipe, args.overrides)
    looker = hosts.looker(args, recipe)
    found = looker.look(listed)
    speed = None
    if not args.quick and all(verdict.ok for verdict in found):
        speed = looker.exercise(found)
    _report(found, speed, as_json=args.json)
    return 0 if all(verdict.ok for verdict in found) else errors.EXIT_FAULTS


def _report(found: Sequence[Verdict], speed: float | None, *, as_json: bool) -> None:
    if as_json:
        each = [dataclasses.asdict(verdict) | {"ok": verdict.ok} for verdict in found]
        sys.stdout.write(json.dumps({"hosts": each, "all_reduce_gbit": speed}, indent=1) + "\n")
        return
    for verdict in found:
        sys.stdout.write(line(verdict) + "\n")
    if speed is not None:
        ranks = sum(verdict.host.slots for verdict in found)
        sys.stdout.write(f"all-reduce over {ranks} ranks: {speed:.1f} Gbit/s\n")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    hosts.add_arguments(parser)
    parser.add_argument("--recipe", type=Path, help="of the run: its folders, manifests and shards")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="change recipe keys")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    errors.command(main)()
