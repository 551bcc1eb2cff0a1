"""NVIDIA GPUs: memory, speed and links of the common models, by the name that the driver gives."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """key: short name. pattern: of the whole name that the driver gives. memory_gib: as usable.

    tflops: bfloat16 matrix products with float32 accumulation, dense (no sparsity), 1e12 operations a second.
    bandwidth: of its memory; link: to the other GPUs of the node, in one direction; GB (1e9 bytes) a second.
    """

    key: str
    pattern: str
    memory_gib: float
    tflops: float
    bandwidth: float
    link: float


# NVIDIA's data sheets of each (where they give the rate with sparsity, half of it), and for the GeForce and RTX models
# the tables of the architecture white papers (GA102, Ada, RTX Blackwell). Links: NVLink as on HGX boards, else PCIe.
GPUS = (
    Gpu("a100-40", r"A100-(SXM4|PCIE)-40GB", 39.5, 312.0, 1555, 300),
    Gpu("a100-pcie", r"A100 80GB PCIe", 79.2, 312.0, 1935, 25),
    Gpu("a100", r"A100-SXM4-80GB", 79.2, 312.0, 2039, 300),
    Gpu("a800", r"A800-SXM4-80GB", 79.2, 312.0, 2039, 200),
    Gpu("h100-pcie", r"H100 PCIe", 79.2, 756.0, 2000, 55),
    Gpu("h100-nvl", r"H100 NVL", 93.1, 835.0, 3938, 300),
    Gpu("h100", r"H100 80GB HBM3", 79.2, 989.4, 3350, 450),
    Gpu("h800", r"H800", 79.2, 989.4, 3350, 200),
    Gpu("h20", r"H20", 95.1, 148.0, 4000, 450),
    Gpu("h200", r"H200", 139.8, 989.4, 4800, 450),
    Gpu("b200", r"B200", 178.3, 2250.0, 7700, 900),
    Gpu("a10", r"A10", 22.1, 125.0, 600, 25),
    Gpu("a40", r"A40", 44.5, 149.7, 696, 25),
    Gpu("l4", r"L4", 22.1, 121.0, 300, 25),
    Gpu("l40s", r"L40S", 44.5, 362.0, 864, 25),
    Gpu("rtx3090", r"GeForce RTX 3090", 23.7, 71.0, 936, 25),
    Gpu("rtx4090", r"GeForce RTX 4090", 23.6, 165.2, 1008, 25),
    Gpu("rtx5090", r"GeForce RTX 5090", 31.4, 209.5, 1792, 55),
)


def known_gpu(name: str) -> Gpu | None:
    """The GPU that the driver, or torch, calls by this name; None for one that is not in the table, a MIG slice too."""
    name = name.removeprefix("NVIDIA ").strip()
    return next((gpu for gpu in GPUS if re.fullmatch(gpu.pattern, name)), None)
