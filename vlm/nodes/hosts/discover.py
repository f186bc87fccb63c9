"""Where hosts come from: ``user@host:port`` arguments, SLURM, a RunPod cluster, the RunPod API.

Each returns ``Host``s or says what it did not find. Not here: the file they are written to
(``vlm.nodes.hosts.hostfile``).
"""

import json
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

from vlm.errors import ConfigError, one_line
from vlm.nodes.hosts.hostfile import SSH_PORT, Host, check_name

RUNPOD_API = "https://rest.runpod.io/v1"
RUNPOD_KEY = "RUNPOD_API_KEY"
#: between the nodes of an Instant Cluster; eth0 there leads outside
RUNPOD_IFACE = "ens1"
MAX_HOSTS = 4096
MAX_ANSWER = 2**20
TIMEOUT_S = 30.0

#: name -> address
Resolve = Callable[[str], str]


def from_arguments(targets: Sequence[str], slots: int) -> list[Host]:
    """``[user@]host[:port]``; an IPv6 address with a port stands in brackets.

    Raises:
        ConfigError: one of them is none.
    """
    return [_from_argument(target, slots) for target in targets]


def _from_argument(target: str, slots: int) -> Host:
    user, at, rest = target.rpartition("@")
    match = re.fullmatch(r"\[([^\[\]]+)\](?::(\d+))?|([^:\[\]]+)(?::(\d+))?|([^\[\]]+)", rest)
    if not match or (at and not user):
        raise ConfigError(f"found {target!r}, expected [user@]host[:port]")
    name = match[1] or match[3] or match[5]
    port = int(match[2] or match[4] or SSH_PORT)
    try:
        return Host(check_name(name), slots, user=user or None, port=port)
    except ValueError as error:
        raise ConfigError(f"{target!r}: {error}") from None


def from_slurm(env: Mapping[str, str], slots: int | None = None) -> list[Host]:
    """The nodes of the SLURM job that this runs in.

    Args:
        slots: processes a node; None: the GPUs that the job has on each.

    Raises:
        ConfigError: it runs in none, or the job's GPUs are not the same on all nodes.
    """
    found = env.get("SLURM_JOB_NODELIST")
    if not found:
        raise ConfigError(
            "SLURM_JOB_NODELIST is not set: not inside a SLURM job; run this inside salloc or "
            "sbatch, or name the hosts"
        )
    if slots is None:
        count = env.get("SLURM_GPUS_ON_NODE") or env.get("SLURM_GPUS_PER_NODE", "")
        match = re.fullmatch(r"(?:[A-Za-z0-9_.-]+:)?(\d+)", count)
        if not match or int(match[1]) == 0:
            raise ConfigError(
                f"SLURM_GPUS_ON_NODE is {count!r}, expected the GPUs of each node; say --slots N"
            )
        slots = int(match[1])
    return [Host(name, slots) for name in expand_nodelist(found)]


def expand_nodelist(text: str) -> list[str]:
    """``gpu[01-03,7],login`` -> gpu01, gpu02, gpu03, gpu7, login, as ``scontrol show hostnames``.

    Raises:
        ConfigError: the brackets or ranges are wrong, or name more than ``MAX_HOSTS``.
    """
    parts = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    if ",".join(parts) != text or not parts:
        raise ConfigError(f"found the node list {text!r}, expected one such as gpu[01-04,7]")
    names: list[str] = []
    for part in parts:
        pieces = re.split(r"\[([^\]]*)\]", part)
        found = [pieces[0]]
        for ranges, rest in zip(pieces[1::2], pieces[2::2], strict=True):
            numbers = [n for item in ranges.split(",") for n in _numbers(item, text)]
            if len(found) * len(numbers) > MAX_HOSTS:
                raise ConfigError(f"node list {text!r} names more than {MAX_HOSTS} hosts")
            found = [f"{head}{number}{rest}" for head in found for number in numbers]
        names += found
        if len(names) > MAX_HOSTS:
            raise ConfigError(f"node list {text!r} names more than {MAX_HOSTS} hosts")
    try:
        return [check_name(name) for name in names]
    except ValueError as error:
        raise ConfigError(f"node list {text!r}: {error}") from None


def _numbers(item: str, text: str) -> list[str]:
    match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", item)
    if not match:
        raise ConfigError(f"node list {text!r}: found {item!r}, expected a number or a range")
    first, last = int(match[1]), int(match[2] or match[1])
    if not first <= last < first + MAX_HOSTS:
        raise ConfigError(f"node list {text!r}: {item!r} is no range of at most {MAX_HOSTS}")
    return [f"{number:0{len(match[1])}d}" for number in range(first, last + 1)]


def from_runpod_cluster(
    env: Mapping[str, str], resolve: Resolve = socket.gethostbyname
) -> list[Host]:
    """The nodes of the RunPod Instant Cluster that this runs on, as its environment names them.

    Nodes are called node-0, node-1, ...; the address of this one and of the first are known and
    have to agree with what the names resolve to.

    Raises:
        ConfigError: it runs on none, or the names do not lead to its nodes.
    """
    names = ("NUM_NODES", "NUM_TRAINERS", "NODE_RANK", "NODE_ADDR", "PRIMARY_ADDR")
    if missing := [name for name in names if not env.get(name)]:
        raise ConfigError(
            f"{', '.join(missing)} not set: not on a node of a RunPod Instant Cluster; run this "
            "there (the variables are missing in `ssh host command`: log in), or name the hosts"
        )
    try:
        num_nodes, slots, rank = (int(env[name]) for name in names[:3])
    except ValueError:
        raise ConfigError(f"{', '.join(names[:3])}: expected whole numbers") from None
    if not 0 <= rank < num_nodes <= MAX_HOSTS:
        raise ConfigError(f"found NODE_RANK={rank} and NUM_NODES={num_nodes}, expected one of them")
    hosts = []
    for node in range(num_nodes):
        name = f"node-{node}"
        expected = {rank: env["NODE_ADDR"], 0: env["PRIMARY_ADDR"]}.get(node)
        try:
            address = resolve(name)
        except OSError as error:
            if expected is None:
                raise ConfigError(
                    f"{name} does not resolve ({error.strerror}); add the nodes to /etc/hosts, or "
                    "name them by address"
                ) from None
            address = expected
        if expected not in (None, address):
            raise ConfigError(f"{name} resolves to {address}, expected {expected}; mend /etc/hosts")
        hosts.append(Host(check_name(address), slots, iface=RUNPOD_IFACE))
    return hosts


def from_runpod_api(
    pods: Sequence[str], env: Mapping[str, str], api: str = RUNPOD_API
) -> list[Host]:
    """Pods by their ids, at the public addresses and ssh ports that they have now.

    The ports change whenever a pod is reset. The key stands in the environment and nowhere else.

    Raises:
        ConfigError: no key, no such pod, or a pod that ssh cannot reach.
    """
    key = env.get(RUNPOD_KEY)
    if not key:
        raise ConfigError(f"{RUNPOD_KEY} is not set; expected a RunPod API key in the environment")
    return [_pod(pod, _get(f"{api}/pods/{quote(pod, safe='')}", pod, key)) for pod in pods]


def _get(url: str, pod: str, key: str) -> Any:
    request = Request(url)
    request.add_unredirected_header("Authorization", f"Bearer {key}")
    try:
        with urlopen(request, timeout=TIMEOUT_S) as answer:
            return json.loads(answer.read(MAX_ANSWER))
    except HTTPError as error:
        reasons = {401: f"{RUNPOD_KEY} was refused", 404: "there is no such pod"}
        reason = reasons.get(error.code, f"the API answered {error.code}")
    except (URLError, OSError, ValueError) as error:
        reason = f"no answer from the API ({one_line(error).replace(key, '...')})"
    raise ConfigError(f"pod {pod}: {reason}")


def _pod(pod: str, answer: Any) -> Host:
    found = answer if isinstance(answer, dict) else {}
    ports = found.get("portMappings")
    port = ports.get(str(SSH_PORT)) if isinstance(ports, dict) else None
    address, slots = found.get("publicIp"), found.get("gpuCount")
    if not slots and isinstance(found.get("gpu"), dict):
        slots = found["gpu"].get("count")
    if not (isinstance(port, int) and 0 < port < 65536 and isinstance(address, str) and address):
        raise ConfigError(
            f"pod {pod} has no public address and port for ssh; it must run, with 22/tcp exposed"
        )
    if not isinstance(slots, int) or slots < 1:
        raise ConfigError(f"pod {pod} has no GPU")
    try:
        return Host(check_name(address), slots, user="root", port=port)
    except ValueError as error:
        raise ConfigError(f"pod {pod}: {error}") from None
