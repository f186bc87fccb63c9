"""What a host is like: runs there, prints one JSON object.

Sent as text to the host's own Python, so it imports nothing but the standard library: a host
without this toolkit, or with another version of it, answers too. Not here: what of it is good
enough (``vlm.nodes.hosts.preflight``).
"""

import contextlib
import csv
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import resource
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "deepspeed", "transformers", "peft")
GPU_FIELDS = ("index", "uuid", "name", "memory.total", "memory.used")
#: since the driver took hold of the GPU: a reset clears it
ECC_FIELD = "ecc.errors.uncorrected.volatile.total"
#: in place of what a GPU does not count; anything else that is no number is a fault of it
NOT_COUNTED = ("[N/A]", "[Not Supported]")
SMI_TIMEOUT_S = 30
MAX_SAID = 300
SIOCGIFADDR, SIOCGIFNETMASK = 0x8915, 0x891B
CHUNK = 2**20


def facts(request: dict[str, Any]) -> dict[str, Any]:
    """All that can be seen without waiting for another host.

    Args:
        request: ``code`` folder of the toolkit; ``paths`` to be written to; ``files`` as
            [path, bytes] that must be there; ``manifests`` to be hashed; ``port`` to be free, or
            None.
    """
    gpus, gpu_fault = _gpus()
    return {
        "time": time.time(),
        "hostname": socket.gethostname(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": _cuda(),
        "nccl": next(filter(None, (_version(f"nvidia-nccl-cu{n}") for n in (13, 12, 11))), None),
        "code": _code(Path(request["code"])),
        "gpus": gpus,
        "gpu_fault": gpu_fault,
        "interfaces": _interfaces(),
        "disks": {path: _disk(path) for path in [*request["paths"], "/dev/shm"]},
        "missing": [f"{path}: {why}" for path, n in request["files"] if (why := _fault(path, n))],
        "manifests": {path: _sha256(Path(path)) for path in request["manifests"]},
        "memory": _memory(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "locked_memory": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "port": None if request["port"] is None else _port(request["port"]),
    }


def meet(request: dict[str, Any]) -> dict[str, Any]:
    """Looks for the other hosts: who listens, who reaches it, and who sees its folder.

    Args:
        request: ``listen`` (port, or None to connect), ``peers`` how many connect, ``address`` and
            ``port`` to connect to, ``folder`` and ``token`` of the shared folder, ``wait_s``.
    """
    mark = Path(request["folder"]) / f".preflight-{request['token']}"
    stop = time.monotonic() + request["wait_s"]
    if request["listen"] is None:
        fault, sees = _visit(request, stop, mark)
        return {"fault": fault, "shared": sees}
    made = _attempt(lambda: _make(mark))
    try:
        return {"fault": _listen(request, stop), "shared": made is None}
    finally:
        mark.unlink(missing_ok=True)


def _make(mark: Path) -> None:
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()


def _listen(request: dict[str, Any], stop: float) -> str | None:
    """Waits until all peers have come and gone."""
    peers = []
    with socket.create_server(("", request["listen"]), backlog=128) as server:
        for seen in range(request["peers"]):
            server.settimeout(max(0.01, stop - time.monotonic()))
            try:
                peers.append(server.accept()[0])
            except TimeoutError:
                return f"{seen} of {request['peers']} hosts connected"
    for peer in peers:
        peer.settimeout(max(0.01, stop - time.monotonic()))
        with peer, contextlib.suppress(OSError):
            peer.recv(1)
    return None


def _visit(request: dict[str, Any], stop: float, mark: Path) -> tuple[str | None, bool]:
    """Why the first host cannot be reached, and whether its mark is seen while it waits."""
    connected: list[socket.socket] = []

    def connect() -> None:
        connected.append(socket.create_connection((request["address"], request["port"]), 5))

    fault = _until(stop, lambda: _attempt(connect))
    sees = _until(stop, lambda: None if mark.exists() else "not there") is None
    for connection in connected:
        connection.close()
    return fault, sees


def _attempt(action: Callable[[], object]) -> str | None:
    """What went wrong, or None."""
    try:
        action()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _until(stop: float, action: Callable[[], str | None]) -> str | None:
    """Tries until nothing goes wrong or time is up."""
    while (fault := action()) and time.monotonic() < stop:
        time.sleep(0.1)
    return fault


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda() -> str | None:
    """CUDA that torch was built for, without the seconds that importing it takes."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        found = importlib.util.find_spec("torch")
        if found is not None and found.origin is not None:
            text = (Path(found.origin).parent / "version.py").read_text()
            match = re.search(r"^cuda\b.*=\s*'([\d.]+)'", text, re.M)
            return match[1] if match else None
    return None


def _code(folder: Path) -> str | None:
    """Hash of the toolkit's Python files; None where there is none."""
    names = sorted(p for part in ("vlm", "launch") for p in (folder / part).rglob("*.py"))
    if not names:
        return None
    digest = hashlib.sha256()
    for path in names:
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _gpus() -> tuple[list[dict[str, Any]], str | None]:
    """Those that nvidia-smi lists, and its complaint: a GPU that is lost may have no row."""
    rows, fault = _smi("--query-gpu", (*GPU_FIELDS, ECC_FIELD))
    busy = [row[0] for row in _smi("--query-compute-apps", ("gpu_uuid",))[0]]
    return [_gpu(row, busy) for row in rows if row[0].isdecimal()], fault


def _gpu(row: list[str], busy: list[str]) -> dict[str, Any]:
    index, uuid, name, *counted = row
    total, used, ecc_errors = (int(text) if text.isdecimal() else None for text in counted)
    faults = [t for t in counted if not t.isdecimal() and t not in NOT_COUNTED]
    return {
        "index": int(index),
        "name": name,
        "memory_mib": total,
        "used_mib": used,
        "num_processes": busy.count(uuid),
        "ecc_errors": ecc_errors,
        "fault": faults[0] if faults else None,
    }


def _smi(query: str, fields: tuple[str, ...]) -> tuple[list[list[str]], str | None]:
    """Rows of nvidia-smi, and why there may be too few of them."""
    argv = ["nvidia-smi", f"{query}={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, errors="replace", timeout=SMI_TIMEOUT_S
        )
    except OSError as error:
        return [], error.strerror
    except subprocess.TimeoutExpired:
        return [], f"no answer within {SMI_TIMEOUT_S} s"
    rows, said = [], done.stderr.splitlines()
    for line in done.stdout.splitlines():
        row = next(csv.reader([line], skipinitialspace=True), [])
        if len(row) == len(fields):
            rows.append(row)
        else:
            said.append(line)
    if done.returncode == 0:
        return rows, None
    return rows, next(filter(None, said), f"ended with {done.returncode}")[:MAX_SAID]


def _interfaces() -> list[dict[str, Any]]:
    """With an IPv4 address and up; speed in Mbit/s where the driver knows it."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            wanted = struct.pack("256s", name.encode()[:15])
            try:
                address = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, wanted)[20:24]
                mask = fcntl.ioctl(probe.fileno(), SIOCGIFNETMASK, wanted)[20:24]
            except OSError:  # it has none
                continue
            where = Path("/sys/class/net", name)
            state, speed = _text(where / "operstate"), _text(where / "speed")
            found.append(
                {
                    "name": name,
                    "address": socket.inet_ntoa(address),
                    "mask": socket.inet_ntoa(mask),
                    "up": state != "down",
                    "mbit": int(speed) if speed.isdecimal() else None,
                }
            )
    return found


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""


def _disk(path: str) -> dict[str, Any]:
    """Of the nearest folder above that exists."""
    here = Path(path).absolute()
    while not here.exists():
        here = here.parent
    usage = shutil.disk_usage(here)
    return {"free": usage.free, "total": usage.total, "writable": os.access(here, os.W_OK)}


def _fault(path: str, num_bytes: int) -> str | None:
    try:
        found = os.stat(path).st_size
    except OSError as error:
        return error.strerror
    return None if found == num_bytes else f"{found:,} bytes, expected {num_bytes:,}"


def _sha256(path: Path) -> str | None:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    except OSError:
        return None
    return digest.hexdigest()


def _memory() -> dict[str, int]:
    """Bytes."""
    text = _text(Path("/proc/meminfo"))
    kib = {name: int(n) for name, n in re.findall(r"^(\w+):\s+(\d+) kB", text, re.M)}
    return {"total": 1024 * kib.get("MemTotal", 0), "free": 1024 * kib.get("MemAvailable", 0)}


def _port(port: int) -> str | None:
    """Why nobody can listen there, or None."""
    return _attempt(lambda: socket.create_server(("", port)).close())


def main(request: dict[str, Any]) -> None:
    answer = {"facts": facts, "meet": meet}[request["what"]](request)
    sys.stdout.write(json.dumps(answer) + "\n")
