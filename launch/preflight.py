"""Checks the hosts of a hostfile before a run is paid for: one line for each, and why.

python launch/preflight.py --hostfile hostfile --recipe recipes/R.yaml

Start it in the checkout; the same path has to hold it on every host. DS_ACCELERATOR=cpu checks
hosts that have no GPU. Exit code 0: all pass, 1: one does not, 2: misuse.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vlm import config, errors
from vlm.arguments import positive
from vlm.ckpt.files import sha256
from vlm.data.manifest import manifest
from vlm.data.storage import remote
from vlm.nodes import hostfile, preflight, ssh
from vlm.nodes.verdict import Verdict, Wanted, line

#: of the shards, so many are looked at on every host
MAX_SHARDS = 1000
#: folders that programs fill unseen
CACHES = ("HF_HOME", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR")


def main(argv: Sequence[str]) -> int:
    args = _parse(argv)
    hosts = hostfile.read(args.hostfile)
    cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    wanted, files = _wanted(args, gpus=not cpu)
    places = {"python": args.python, "folder": Path.cwd(), "port": args.master_port}
    run = functools.partial(ssh.run, timeout_s=preflight.TIMEOUT_S, known_hosts=args.known_hosts)
    found = preflight.look(hosts, run, wanted=wanted, files=files, **places)
    speed = None
    if not args.quick and all(verdict.ok for verdict in found):
        speed = preflight.exercise(found, run, cpu=cpu, **places)
    _report(found, speed, as_json=args.json)
    return 0 if all(verdict.ok for verdict in found) else errors.EXIT_FAULTS


def _wanted(args: argparse.Namespace, gpus: bool) -> tuple[Wanted, dict[str, int]]:
    """What the run needs of a host, and the bytes of shards that have to be there."""
    output, manifests = Path.cwd(), {}
    files: dict[str, int] = {}
    if args.recipe is not None:
        recipe = config.load(args.recipe, args.overrides)
        output = recipe.output_dir / "checkpoints"
        for path in (source.manifest for source in (*recipe.data.train, recipe.data.eval)):
            shards = manifest.load(path).shards
            manifests[str(path.absolute())] = sha256(path)
            local = [s for s in shards if not remote.is_remote(s.location)]
            every = -(-len(local) // MAX_SHARDS) or 1
            files |= {shard.location: shard.bytes for shard in local[::every]}
    caches = [Path(os.environ[name]) for name in CACHES if os.environ.get(name)]
    paths = [output, *caches, Path(tempfile.gettempdir())]
    unique = tuple(dict.fromkeys(str(path.absolute()) for path in paths))
    return Wanted(unique, manifests, int(args.min_free_gb * 1e9), gpus), files


def _report(found: Sequence[Verdict], speed: float | None, *, as_json: bool) -> None:
    if as_json:
        hosts = [dataclasses.asdict(verdict) | {"ok": verdict.ok} for verdict in found]
        sys.stdout.write(json.dumps({"hosts": hosts, "all_reduce_gbit": speed}, indent=1) + "\n")
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
    parser.add_argument("--hostfile", type=Path, required=True)
    parser.add_argument("--recipe", type=Path, help="of the run: its folders, manifests and shards")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="change recipe keys")
    parser.add_argument("--master-port", type=positive, default=29500, help="(default: 29500)")
    parser.add_argument(
        "--min-free-gb", type=float, default=20.0, help="on each disk (default: 20)"
    )
    parser.add_argument("--python", default=sys.executable, help="on each host (default: this one)")
    parser.add_argument("--known-hosts", type=Path, metavar="FILE", help="in place of ssh's own")
    parser.add_argument("--quick", action="store_true", help="no all-reduce, no matrix product")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    errors.command(main)()
