import contextlib
import hashlib
import importlib.metadata
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ports import free_port
from tests.waiting import wait_for
from vlm.nodes.hosts import probe

ROOT = Path(__file__).parents[3]
SMI = """#!/bin/sh
case "$1" in
--query-gpu=*) printf '%s\\n' "$GPUS";;
--query-compute-apps=*) printf '%s\\n' "$APPS";;
esac
exit "$CODE"
"""


def facts(**changes: Any) -> dict[str, Any]:
    request = {"code": str(ROOT), "paths": [], "files": [], "manifests": [], "port": None}
    return probe.facts({**request, **changes})


def test_versions_without_importing_anything() -> None:
    found = facts()
    assert found["packages"]["torch"] == importlib.metadata.version("torch")
    assert found["cuda"] == torch.version.cuda
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert abs(found["memory"]["total"] - os.sysconf("SC_PHYS_PAGES") * 4096) < 2**30


def test_only_the_standard_library_is_imported() -> None:
    code = "import sys; before = set(sys.modules)\n" + Path(probe.__file__).read_text()
    code += "\nnew = {n.partition('.')[0] for n in set(sys.modules) - before}"
    code += "\nassert new <= sys.stdlib_module_names, new"
    subprocess.run([sys.executable, "-I", "-c", code], check=True, timeout=60)


def test_files_disks_and_manifests(tmp_path: Path) -> None:
    there = tmp_path / "0.tar"
    there.write_bytes(b"x" * 100)
    files = [[str(there), 100], [str(there), 99], [str(tmp_path / "1.tar"), 7]]
    deep = str(tmp_path / "not/yet")
    found = facts(files=files, paths=[deep], manifests=[str(there), "/nowhere"])
    assert found["missing"] == [
        f"{there}: 100 bytes, expected 99",
        f"{tmp_path}/1.tar: No such file or directory",
    ]
    sha256 = hashlib.sha256(b"x" * 100).hexdigest()
    assert found["manifests"] == {str(there): sha256, "/nowhere": None}
    assert found["disks"][deep]["writable"] and found["disks"][deep]["free"] > 0


def test_the_toolkit_is_known_by_its_files(tmp_path: Path) -> None:
    (tmp_path / "vlm").mkdir()
    assert facts(code=str(tmp_path))["code"] is None
    (tmp_path / "vlm/a.py").write_text("x = 1\n")
    first = facts(code=str(tmp_path))["code"]
    assert first == facts(code=str(tmp_path))["code"]
    (tmp_path / "vlm/a.py").write_text("x = 2\n")
    assert facts(code=str(tmp_path))["code"] != first


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Any]]:
    """What is seen of GPUs where nvidia-smi says this."""
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def found(*lines: str, apps: str = "", code: int = 0) -> tuple[Any, Any]:
        program.write_text(SMI)
        program.chmod(0o755)
        for name, value in (("GPUS", "\n".join(lines)), ("APPS", apps), ("CODE", str(code))):
            monkeypatch.setenv(name, value)
        seen = facts()
        return seen["gpus"], seen["gpu_fault"]

    return found


FIRST = "0, GPU-a, NVIDIA A100-SXM4-80GB, 81920, 4, 0"


def test_gpus_as_nvidia_smi_lists_them(smi: Callable[..., tuple[Any, Any]]) -> None:
    other = "1, GPU-b, NVIDIA GeForce RTX 4090, 24564, 9000, [N/A]"
    (first, second), fault = smi(FIRST, other, apps="GPU-b\nGPU-b")
    assert fault is None and first == {
        "index": 0,
        "name": "NVIDIA A100-SXM4-80GB",
        "memory_mib": 81920,
        "used_mib": 4,
        "num_processes": 0,
        "ecc_errors": 0,
        "fault": None,
    }
    assert (second["num_processes"], second["ecc_errors"], second["fault"]) == (2, None, None)


def test_gpus_that_are_lost(smi: Callable[..., tuple[Any, Any]]) -> None:
    said = "Unable to determine the device handle for GPU 0000:41:00.0: GPU is lost, reboot"
    (left,), fault = smi(FIRST, said, code=15)
    assert left["index"] == 0 and fault == said
    lost = "1, GPU-b, NVIDIA A100-SXM4-80GB, [GPU is lost], [GPU is lost], [GPU is lost]"
    (_, broken), fault = smi(FIRST, lost)
    assert fault is None
    assert (broken["memory_mib"], broken["fault"]) == (None, "[GPU is lost]")
    assert smi(code=9) == ([], "ended with 9")


def test_no_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = facts()
    assert (found["gpus"], found["gpu_fault"]) == ([], "No such file or directory")


def test_a_port_in_use() -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        assert "in use" in facts(port=port)["port"]
    assert facts(port=port)["port"] is None


def test_interfaces() -> None:
    (loopback,) = [found for found in facts()["interfaces"] if found["name"] == "lo"]
    assert (loopback["address"], loopback["mask"]) == ("127.0.0.1", "255.0.0.0")
    assert loopback["up"]


def meet(folders: list[Path], wait_s: float, listen: bool = True) -> list[dict[str, Any]]:
    port = free_port()
    request = {"address": "127.0.0.1", "port": port, "token": "t", "wait_s": wait_s, "peers": 2}
    found: list[dict[str, Any]] = [{}] * len(folders)

    def one(index: int) -> None:
        own = {"folder": str(folders[index]), "listen": None if index else port}
        found[index] = probe.meet({**request, **own})

    threads = [threading.Thread(target=one, args=[i]) for i in range(not listen, len(folders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_hosts_meet_and_see_one_folder(tmp_path: Path) -> None:
    shared, other = tmp_path / "shared", tmp_path / "other"
    assert meet([shared, shared, other], 3.0) == [
        {"fault": None, "shared": True},
        {"fault": None, "shared": True},
        {"fault": None, "shared": False},
    ]
    assert list(shared.iterdir()) == []


def test_the_first_host_waits_until_the_others_have_looked(tmp_path: Path) -> None:
    port = free_port()
    request = {"listen": port, "peers": 1, "folder": str(tmp_path), "token": "t", "wait_s": 60}
    first = threading.Thread(target=probe.meet, args=[request])
    first.start()

    def connect() -> socket.socket | None:
        with contextlib.suppress(OSError):
            return socket.create_connection(("127.0.0.1", port), 5)
        return None

    with wait_for(connect):
        first.join(1.5)
        assert first.is_alive() and [p.name for p in tmp_path.iterdir()] == [".preflight-t"]
    first.join(30)
    assert not first.is_alive() and list(tmp_path.iterdir()) == []


def test_nobody_listens_and_nobody_comes(tmp_path: Path) -> None:
    found = meet([tmp_path] * 3, 0.3, listen=False)
    assert "refused" in found[1]["fault"] and not found[1]["shared"]
    (alone,) = meet([tmp_path], 0.3)
    assert alone["fault"] == "0 of 2 hosts connected"
