"""What a host says of itself that is fit for a run."""

from typing import Any


def gpu(index: int, **changes: Any) -> dict[str, Any]:
    found = {"index": index, "name": "A100", "memory_mib": 81920, "used_mib": 4}
    return {**found, "num_processes": 0, "ecc_errors": 0, "fault": None, **changes}


def facts(**changes: Any) -> dict[str, Any]:
    disk = {"free": int(1e11), "total": int(2e11), "writable": True}
    return {
        "skew_s": 0.1,
        "python": "3.11.7",
        "packages": {"torch": "2.13.0", "deepspeed": "0.19.8"},
        "cuda": "12.8",
        "nccl": "2.27",
        "code": "0123",
        "gpus": [gpu(0), gpu(1)],
        "gpu_fault": None,
        "disks": {"/runs": disk, "/tmp": disk, "/dev/shm": disk},
        "missing": [],
        "manifests": {"/m": "abc"},
        "memory": {"free": 2**36, "total": 2**37},
        "num_cpus": 8,
        "open_files": 65536,
        "port": None,
        **changes,
    }
