"""Memory, speed and links of common NVIDIA GPUs, by the name that the driver reports."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """key: short name. pattern: of the driver's full name. memory_gib: usable memory.

    tflops: dense bfloat16 matrix products with float32 accumulation, 1e12 operations per second.
    bandwidth: of memory; link: to the node's other GPUs, in one direction; GB (1e9 bytes) per second.
    """

    key: str
    pattern: str
    memory_gib: float
    tflops: float
    bandwidth: float
    link: float


# From NVIDIA's data sheets (half of rates given with sparsity), and for GeForce and RTX models from the architecture
# white papers (GA102, Ada, RTX Blackwell). Links: NVLink as on HGX boards, else PCIe.
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
    """Return the GPU with this name in the driver or torch; None if it is not in the table (a MIG slice is not)."""
    name = name.removeprefix("NVIDIA ").strip()
    return next((gpu for gpu in GPUS if re.fullmatch(gpu.pattern, name)), None)
