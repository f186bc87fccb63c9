"""What of the hosts' facts stands in the way of a run: pure functions from facts to words.

Not here: how facts are gathered (``vlm.nodes.hosts.probe``, ``vlm.nodes.hosts.preflight``).
"""

import ipaddress
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm.errors import one_line
from vlm.nodes.hosts.hostfile import Host

#: logs of hosts are merged by time
MAX_SKEW_S = 5.0
MIN_SHM = 2**30
MIN_OPEN_FILES = 4096
MIN_MEMORY = 4 * 2**30
#: of a GPU that nobody uses
IDLE_GPU_MIB = 1024
#: a host whose link is slower than this share of the median is named, and so is a GPU
SLOW_FRAC = 0.6
#: below this nothing larger than a toy trains over it: a gigabyte of gradients takes a minute
MIN_GBIT = 0.5
#: what has a problem of its own where there is none
MISSING_IS_SAID = ("torch", "toolkit")
#: between the nodes of a RunPod Instant Cluster
FABRIC = "ens"


@dataclass
class Verdict:
    """On one host."""

    host: Host
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    #: network interface for NCCL and gloo, and why this one
    iface: str | None = None
    why_iface: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    #: to the next host of the ring
    gbit: float | None = None
    #: of each GPU, or of the CPU
    tflops: list[float] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class Wanted:
    """What a run needs of each host.

    Attributes:
        paths: what will be written to.
        manifests: path -> sha256 here.
        min_free: bytes on each of ``paths``.
        gpus: whether each slot is a GPU.
    """

    paths: tuple[str, ...]
    manifests: Mapping[str, str]
    min_free: int
    gpus: bool


def judge(verdicts: Sequence[Verdict], wanted: Wanted) -> None:
    """Adds what is wrong with the hosts that answered."""
    answered = [verdict for verdict in verdicts if verdict.facts]
    for verdict in answered:
        _judge_machine(verdict, wanted)
        _judge_data(verdict, wanted)
        if wanted.gpus:
            _judge_gpus(verdict)
    same: dict[str, list[Any]] = {"python": [v.facts["python"] for v in answered]}
    for name in answered[0].facts["packages"] if answered else ():
        same[name] = [v.facts["packages"][name] for v in answered]
    same |= {key: [v.facts[key] for v in answered] for key in ("cuda", "nccl")}
    same["toolkit"] = [v.facts["code"] for v in answered]
    for what, values in same.items():
        _judge_same(answered, what, values)
    if wanted.gpus:
        having = [verdict for verdict in answered if verdict.facts["gpus"]]
        names = [", ".join(sorted({g["name"] for g in v.facts["gpus"]})) for v in having]
        for verdict, value, common in _others(having, names):
            verdict.warnings.append(f"GPUs differ: found {value}, the others have {common}")


def _judge_same(answered: Sequence[Verdict], what: str, values: Sequence[Any]) -> None:
    for verdict, value, common in _others(answered, values):
        if value is None and what in MISSING_IS_SAID:
            continue
        verdict.problems.append(
            f"{what} differs: found {value}, the others have {common}; install the same everywhere"
        )


def _others(answered: Sequence[Verdict], values: Sequence[Any]) -> list[tuple[Verdict, Any, Any]]:
    """Hosts whose value is not the most common one, with both; of two as common the first one's."""
    if len(set(values)) < 2:
        return []
    common = Counter(values).most_common()[0][0]  # the first seen of those as common
    return [
        (verdict, value, common)
        for verdict, value in zip(answered, values, strict=True)
        if value != common
    ]


def _judge_machine(verdict: Verdict, wanted: Wanted) -> None:
    facts = verdict.facts
    if abs(facts["skew_s"]) > MAX_SKEW_S:
        verdict.problems.append(f"its clock is {facts['skew_s']:+.1f} s off; start ntp or chrony")
    if facts["packages"]["torch"] is None:
        verdict.problems.append("torch is not installed for the Python that would run")
    if facts["code"] is None:
        verdict.problems.append("the toolkit is not in the folder that training starts in")
    if facts["port"]:
        verdict.problems.append(f"the master port cannot be used: {facts['port']}")
    if facts["memory"]["free"] < MIN_MEMORY:
        verdict.warnings.append(f"{facts['memory']['free'] / 2**30:.1f} GiB of memory free")
    if facts["open_files"] < MIN_OPEN_FILES:
        verdict.warnings.append(f"ulimit -n is {facts['open_files']}, expected {MIN_OPEN_FILES}")
    for path, disk in facts["disks"].items():
        if path == "/dev/shm":
            if disk["total"] < MIN_SHM and wanted.gpus:
                verdict.problems.append(
                    f"/dev/shm has {disk['total'] / 2**20:.0f} MiB; NCCL needs 1 GiB "
                    "(docker run --shm-size)"
                )
        elif not disk["writable"]:
            verdict.problems.append(f"{path} cannot be written to")
        elif disk["free"] < wanted.min_free:
            verdict.problems.append(
                f"{path} has {disk['free'] / 1e9:.1f} GB free, expected {wanted.min_free / 1e9:g}"
            )


def _judge_data(verdict: Verdict, wanted: Wanted) -> None:
    missing = verdict.facts["missing"]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        verdict.problems.append(f"shards: {missing[0]}{more}")
    for path, sha256 in wanted.manifests.items():
        found = verdict.facts["manifests"][path]
        if found != sha256:
            state = "is not there" if found is None else "is another one than here"
            verdict.problems.append(f"manifest {path} {state}")


def _judge_gpus(verdict: Verdict) -> None:
    """One GPU too few is enough: a host runs on all its slots or not at all."""
    gpus, slots, complaint = verdict.facts["gpus"], verdict.host.slots, verdict.facts["gpu_fault"]
    said = [f"GPU {gpu['index']} does not answer: {gpu['fault']}" for gpu in gpus if gpu["fault"]]
    said += [f"nvidia-smi: {complaint}"] if complaint else []
    working = [gpu for gpu in gpus if not gpu["fault"]]
    if len(working) < slots:
        because = f" ({'; '.join(said)})" if said else ""
        verdict.problems.append(f"{len(working)} GPUs for {slots} slots{because}")
    else:
        verdict.warnings += said
    for gpu in working[:slots]:
        name = f"GPU {gpu['index']}"
        if gpu["num_processes"] or (gpu["used_mib"] or 0) > IDLE_GPU_MIB:
            verdict.problems.append(
                f"{name} is in use: {gpu['num_processes']} processes, {gpu['used_mib']} MiB"
            )
        if gpu["ecc_errors"]:
            verdict.problems.append(f"{name} has {gpu['ecc_errors']} uncorrected memory errors")


def choose_interface(
    host: Host, address: str, interfaces: Sequence[Mapping[str, Any]]
) -> tuple[str | None, str]:
    """The network interface that ranks of a host talk over, and why it is this one.

    Args:
        address: an IPv4 address at which the other hosts reach it.
    """
    up = [found for found in interfaces if found["up"]]
    if host.iface is not None:
        if any(found["name"] == host.iface for found in up):
            return host.iface, "the hostfile says so"
        return None, f"there is no interface {host.iface}; there are {_names(up)}"
    fabric = sorted(found["name"] for found in up if found["name"].startswith(FABRIC))
    if len(fabric) > 1:  # one external, the others between the nodes
        return fabric[0], "the first of several between the nodes of a cluster"
    for found in up:
        network = ipaddress.ip_network(f"{found['address']}/{found['mask']}", strict=False)
        if ipaddress.ip_address(address) in network:
            return found["name"], f"{address} lies in its network"
    real = [found for found in up if found["name"] != "lo"]
    if len(real) == 1:
        return real[0]["name"], "the only one"
    return None, f"{address} is of none of {_names(up)}; say iface= in the hostfile"


def _names(interfaces: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{found['name']} ({found['address']})" for found in interfaces) or "none"


def judge_speed(verdicts: Sequence[Verdict]) -> None:
    """Names links and GPUs that are slower than the others, or too slow for anything."""
    links = [verdict.gbit for verdict in verdicts if verdict.gbit is not None]
    for index, verdict in enumerate(verdicts):
        if verdict.gbit is None:
            continue
        target = verdicts[(index + 1) % len(verdicts)].host.name
        # a ring has two links at each host: it is slow itself if both are
        before = verdicts[index - 1].gbit
        slower = max(verdict.gbit, before if before is not None else verdict.gbit)
        if verdict.gbit < MIN_GBIT:
            verdict.problems.append(
                f"{verdict.gbit:.2f} Gbit/s to {target}: too slow to train over; a private "
                "network between the hosts is needed"
            )
        elif len(links) > 2 and slower < SLOW_FRAC * _median(links):
            verdict.problems.append(
                f"its links are slow: {slower:.1f} Gbit/s, the median is {_median(links):.1f}"
            )
    speeds = [speed for verdict in verdicts for speed in verdict.tflops]
    for verdict in verdicts:
        for rank, speed in enumerate(verdict.tflops):
            if speed < SLOW_FRAC * _median(speeds):
                verdict.problems.append(
                    f"slot {rank} computes slowly: {speed:.3g} TFLOP/s, the median is "
                    f"{_median(speeds):.3g}; another job, heat, or a broken GPU"
                )


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def line(verdict: Verdict) -> str:
    """One line of text."""
    facts, parts = verdict.facts, []
    if verdict.ok and facts:
        gpus = Counter(gpu["name"] for gpu in facts["gpus"][: verdict.host.slots])
        parts += [f"{count} x {name}" for name, count in gpus.items()] or [
            f"{verdict.host.slots} slots on {facts['num_cpus']} CPU cores"
        ]
        parts.append(f"torch {facts['packages']['torch']}")
        parts.append(f"over {verdict.iface} ({verdict.why_iface})")
    if verdict.gbit is not None:
        parts.append(f"{verdict.gbit:.1f} Gbit/s to the next")
    if verdict.tflops:
        parts.append(f"{min(verdict.tflops):.3g}-{max(verdict.tflops):.3g} TFLOP/s a slot")
    parts = verdict.problems + [f"({warning})" for warning in verdict.warnings] + parts
    said = one_line("; ".join(parts))  # much of it is what a host says of itself
    return f"{'ok  ' if verdict.ok else 'FAIL'}  {verdict.host.name}  {said}"
