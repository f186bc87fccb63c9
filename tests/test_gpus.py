"""Names of torch find the right type; an unknown one is said so."""

import pytest

from vlm import gpus
from vlm.errors import ConfigError


@pytest.mark.parametrize(
    ("device_name", "memory_gib", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", 79.3, "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", 79.2, "h100-80gb"),
        ("NVIDIA H100 PCIe", 79.1, "h100-pcie"),
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA H200 NVL", 139.8, "h200-nvl"),
        ("NVIDIA L40S", 44.5, "l40s"),
        ("NVIDIA L4", 22.0, "l4"),
        ("NVIDIA RTX A6000", 47.5, "rtx-a6000"),
        ("NVIDIA RTX 6000 Ada Generation", 47.5, "rtx-6000-ada"),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx-4090"),
    ],
)
def test_names_of_torch(device_name: str, memory_gib: float, name: str) -> None:
    assert gpus.of_device(device_name, memory_gib) == gpus.GPUS[name]


def test_what_is_not_known() -> None:
    assert gpus.of_device("Tesla V100-SXM2-16GB", 15.8) is None
    with pytest.raises(ConfigError, match="found 'v100', expected one of a100-40gb, "):
        gpus.find("v100")


def test_peaks_are_dense_and_memory_is_less_than_on_the_box() -> None:
    for name, gpu in gpus.GPUS.items():
        assert 5e13 < gpu.peak_flops < 3e15
        size = [int(word[:-2]) for word in name.split("-") if word.endswith("gb")]
        assert all(0.98 * gib > gpu.memory_gib - 0.1 * gib for gib in size) and gpu.memory_gib > 20
