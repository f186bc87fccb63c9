"""GPU types: how fast they multiply at best, and how much memory they have.

Published figures of their makers: dense bf16 products with fp32 sums, no sparsity, full boost clock
and power. Each but that of the RTX 6000 Ada was found a second time in tables that other projects
measure MFU by (2026-11-21: nanochat's, verl's, lists of the makers' sheets). A chip under a lower
power limit never reaches them. Not here: what is in this machine.
"""

from typing import NamedTuple

from vlm.errors import ConfigError


class Gpu(NamedTuple):
    #: dense bf16, operations a second
    peak_flops: float
    #: as torch reports it, GiB; the driver has taken its part
    memory_gib: float


#: by the name that `--gpu` takes; a name of torch.cuda holds the words of the name it stands for
GPUS = {
    "a100-40gb": Gpu(312e12, 39.4),
    "a100-80gb": Gpu(312e12, 79.2),
    "h100-80gb": Gpu(989.4e12, 79.1),
    "h100-pcie": Gpu(756e12, 79.1),
    "h100-nvl": Gpu(835e12, 93.1),
    "h200": Gpu(989.4e12, 139.7),
    "h200-nvl": Gpu(836e12, 139.7),
    "b200": Gpu(2250e12, 178.3),
    "l40s": Gpu(362.05e12, 44.4),
    "l40": Gpu(181.05e12, 44.4),
    "l4": Gpu(121e12, 22.0),
    "a10": Gpu(125e12, 22.0),
    "a40": Gpu(149.7e12, 44.4),
    "rtx-a6000": Gpu(154.8e12, 47.4),
    "rtx-6000-ada": Gpu(364.2e12, 47.4),
    "rtx-3090": Gpu(71e12, 23.6),
    "rtx-4090": Gpu(165.2e12, 23.6),
    "rtx-5090": Gpu(209.5e12, 31.4),
}


def find(name: str) -> Gpu:
    """
    Raises:
        ConfigError: no such type is known.
    """
    if name not in GPUS:
        raise ConfigError(f"GPU type: found {name!r}, expected one of {', '.join(GPUS)}")
    return GPUS[name]


def of_device(device_name: str, memory_gib: float) -> Gpu | None:
    """The type of a GPU that torch calls ``device_name``; None if it is not known.

    ``NVIDIA A100-SXM4-80GB`` is the type with all of its name's words there that has most of them,
    and of two such the one nearest in memory.
    """
    words = set(device_name.lower().replace("-", " ").split())
    fitting = []
    for name, gpu in GPUS.items():
        own = [word for word in name.split("-") if not word.endswith("gb")]
        if words.issuperset(own):
            fitting.append((-len(own), abs(gpu.memory_gib - memory_gib), gpu))
    return min(fitting)[2] if fitting else None
