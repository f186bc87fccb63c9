"""Looks at all hosts before a run: each by itself, then whether they reach each other.

Not here: the verdicts (``vlm.nodes.hosts.verdict``), how fast they are
(``vlm.nodes.hosts.exercise``).
"""

import functools
import json
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.errors import one_line
from vlm.nodes.hosts import probe, ssh, verdict
from vlm.nodes.hosts.hostfile import Host
from vlm.nodes.hosts.verdict import Verdict, Wanted

#: of one answer; starting torch on a cold disk takes minutes
TIMEOUT_S = 300.0
MEET_S = 30.0
MAX_REASON = 300

#: host, script -> answer
Run = Callable[[Host, str], ssh.Answer]
#: host, request -> the probe's answer, and why there is none
Ask = Callable[[Host, Mapping[str, Any]], tuple[dict[str, Any], str]]
UNREADABLE = "its answer cannot be read; does its login script print something?"


def look(
    hosts: Sequence[Host],
    run: Run,
    *,
    python: str,
    folder: Path,
    wanted: Wanted,
    files: Mapping[str, int],
    port: int | None,
) -> list[Verdict]:
    """Verdicts on all hosts, in their order.

    Args:
        python: the interpreter on each host.
        folder: the checkout on each host.
        files: bytes of files that must be there.
        port: where the first host will listen; None: nobody does, each is looked at by itself.
    """
    request = {
        "what": "facts",
        "code": str(folder),
        "paths": wanted.paths,
        "files": list(files.items()),
        "manifests": list(wanted.manifests),
    }
    ask = functools.partial(_ask, run, python)
    first = hosts[0]
    verdicts = ssh.on_all(
        hosts,
        lambda host: _look_at(host, ask, {**request, "port": port if host is first else None}),
    )
    verdict.judge(verdicts, wanted)
    if port is not None and len(hosts) > 1 and not any(v.problems for v in verdicts):
        _meet(verdicts, ask, port, Path(wanted.paths[0]))
    return verdicts


def _ask(
    run: Run, python: str, host: Host, request: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """The probe's answer on a host, or why there is none."""
    text = ssh.script([python, "-"])
    text += f"{Path(probe.__file__).read_text(encoding='utf-8')}\n\nmain({dict(request)!r})\n"
    answer = run(host, text)
    if answer.code == 0:
        found = _last_object(answer.stdout)
        return ({}, UNREADABLE) if found is None else (found, "")
    if answer.code == ssh.SSH_FAILED:
        return {}, f"ssh: {_last_words(answer) or 'the connection was lost'}"
    if answer.code is None:
        return {}, _last_words(answer)
    return {}, f"{python} ended with {answer.code}: {_last_words(answer)}"


def _last_object(text: str) -> dict[str, Any] | None:
    """The JSON object of the last line; what login scripts print comes before it."""
    try:
        found = json.loads(text.splitlines()[-1])
    except (ValueError, IndexError):
        return None
    return found if found and isinstance(found, dict) else None


def _last_words(answer: ssh.Answer) -> str:
    return one_line(answer.stderr.strip().rpartition("\n")[2])[:MAX_REASON]


def _look_at(host: Host, ask: Ask, request: Mapping[str, Any]) -> Verdict:
    before = time.time()
    facts, fault = ask(host, request)
    after = time.time()
    found = Verdict(host, facts=facts)
    if fault:
        found.problems.append(fault)
        return found
    # it looked at its clock at some moment in between
    facts["skew_s"] = min(0.0, facts["time"] - before) + max(0.0, facts["time"] - after)
    try:
        address = socket.gethostbyname(host.addr or host.name)
    except OSError as error:
        found.problems.append(f"{host.addr or host.name}: {error.strerror}")
        return found
    facts["address"] = address
    found.iface, found.why_iface = verdict.choose_interface(host, address, facts["interfaces"])
    if found.iface is None:
        found.problems.append(found.why_iface)
    return found


def _meet(verdicts: Sequence[Verdict], ask: Ask, port: int, folder: Path) -> None:
    """Every host connects to the first, and looks for a file that the first has made."""
    request = {
        "what": "meet",
        "address": verdicts[0].facts["address"],
        "port": port,
        "folder": str(folder),
        "token": secrets.token_hex(8),
        "peers": len(verdicts) - 1,
        "wait_s": MEET_S,
    }

    def meet(found: Verdict) -> None:
        first = found is verdicts[0]
        answer, fault = ask(found.host, {**request, "listen": port if first else None})
        fault = fault or answer["fault"]
        if fault and first:
            found.warnings.append(f"listened on port {port}: {fault}")
        elif fault:
            found.problems.append(f"cannot reach {request['address']} port {port}: {fault}")
        if answer and not answer["shared"]:
            found.problems.append(
                f"{folder} is not shared with {verdicts[0].host.name}; checkpoints need one folder "
                "that all hosts see"
            )

    ssh.on_all(verdicts, meet)


def exercise(
    verdicts: Sequence[Verdict],
    run: Run,
    *,
    python: str,
    folder: Path,
    port: int,
    cpu: bool,
) -> float | None:
    """All ranks compute and exchange tensors; says which hosts are slow.

    Returns:
        Bus bandwidth of an all-reduce over all ranks in Gbit/s; None where it failed, which stands
        in the verdicts then.
    """
    master = verdicts[0].facts["address"]

    def start(rank: int) -> ssh.Answer:
        found = verdicts[rank]
        env = communication_env(found.iface) | {"OMP_NUM_THREADS": "1"}
        argv = [python, "-m", "torch.distributed.run", f"--nnodes={len(verdicts)}"]
        argv += [f"--node_rank={rank}", f"--nproc_per_node={found.host.slots}"]
        argv += [f"--master_addr={master}", f"--master_port={port}"]
        argv += ["-m", "vlm.nodes.hosts.exercise", *(["--cpu"] if cpu else [])]
        return run(found.host, ssh.script(argv, folder, env))

    answers = ssh.on_all(range(len(verdicts)), start)
    for found, answer in zip(verdicts, answers, strict=True):
        if answer.code != 0:
            found.problems.append(f"all-reduce over all ranks failed: {_last_words(answer)}")
    if any(answer.code != 0 for answer in answers):
        return None
    measured = _last_object(answers[0].stdout)
    if measured is None:
        verdicts[0].problems.append(UNREADABLE)
        return None
    for found, gbit, tflops in zip(verdicts, measured["gbit"], measured["tflops"], strict=True):
        found.gbit, found.tflops = gbit, tflops
    verdict.judge_speed(verdicts)
    return measured["all_reduce_gbit"]


def communication_env(iface: str | None) -> dict[str, str]:
    """What NCCL and gloo have to be told."""
    if iface is None:
        return {}
    return {"NCCL_SOCKET_IFNAME": iface, "GLOO_SOCKET_IFNAME": iface}
