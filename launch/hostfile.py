"""Makes and checks a hostfile.

python launch/hostfile.py check hostfile
python launch/hostfile.py hosts root@10.0.0.4:2222 root@10.0.0.5:2222 --slots 8 --output hostfile
python launch/hostfile.py slurm --output hostfile               inside a SLURM job
python launch/hostfile.py runpod-cluster --output hostfile      on a node of an Instant Cluster
python launch/hostfile.py runpod-pods POD_ID ... --output hostfile      needs RUNPOD_API_KEY
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vlm import errors
from vlm.arguments import positive
from vlm.nodes.hosts import discover, hostfile
from vlm.nodes.hosts.hostfile import Host


def main(argv: Sequence[str]) -> int:
    args = _parse(argv)
    if args.command == "check":
        _show(hostfile.read(args.path))
        return 0
    text = hostfile.to_text(_find(args))
    if args.output is None:
        sys.stdout.write(text)
    else:
        args.output.write_text(text, encoding="utf-8")
        _show(hostfile.read(args.output))
    return 0


def _find(args: argparse.Namespace) -> list[Host]:
    if args.command == "hosts":
        return discover.from_arguments(args.hosts, args.slots)
    if args.command == "slurm":
        return discover.from_slurm(os.environ, args.slots)
    if args.command == "runpod-cluster":
        return discover.from_runpod_cluster(os.environ)
    return discover.from_runpod_api(args.pods, os.environ)


def _show(hosts: Sequence[Host]) -> None:
    table = Table("rank", "host", "slots", "ssh", "address", "interface")
    first = 0
    for host in hosts:
        ranks = f"{first}-{first + host.slots - 1}" if host.slots > 1 else f"{first}"
        login = f"{host.user}@" if host.user else ""
        where = (host.addr or host.name, host.iface or "chosen by preflight")
        table.add_row(ranks, host.name, f"{host.slots}", f"{login}{host.name}:{host.port}", *where)
        first += host.slots
    Console().print(table)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="read one, print its hosts")
    check.add_argument("path", type=Path, metavar="FILE")
    hosts = commands.add_parser("hosts", help="from [user@]host[:port] arguments")
    hosts.add_argument("hosts", nargs="+", metavar="HOST")
    hosts.add_argument("--slots", type=positive, required=True, help="processes on each")
    slurm = commands.add_parser("slurm", help="from the job that this runs in")
    slurm.add_argument("--slots", type=positive, help="default: the job's GPUs on each node")
    cluster = commands.add_parser("runpod-cluster", help="from an Instant Cluster's environment")
    pods = commands.add_parser("runpod-pods", help="from the RunPod API")
    pods.add_argument("pods", nargs="+", metavar="POD_ID")
    for command in (hosts, slurm, cluster, pods):
        command.add_argument("--output", type=Path, metavar="FILE", help="default: stdout")
    return parser.parse_args(argv)


if __name__ == "__main__":
    errors.command(main)()
