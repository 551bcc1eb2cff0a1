import mmap

import psutil
import pytest
import torch

from mssr.distributed import World
from mssr.observe.flops import Flops
from mssr.observe.gpu import known_gpu
from mssr.observe.utilisation import Work, peak_tflops, utilisation
from mssr.stopwatch import GIB, Stopwatch

CPU = torch.device("cpu")
ALONE = World(rank=0, size=1, device=CPU)
TERA = 1e12


class Clock:
    """A step of 10 s: 4 s are forward and backward passes, and there are two scoring passes."""

    seconds = {"generate": 3.0, "old_logp": 1.0, "reference": 1.0, "forward_backward": 4.0}  # noqa: RUF012
    total = 10.0


def test_hand_worked_step():
    flops = Flops(forward=8 * TERA, backward=15 * TERA, recomputed=6 * TERA)
    work = Work(tokens=1000, slots=1250, flops=flops, checkpointing=True)
    values = utilisation(work, Clock(), ALONE, peak=20.0)
    assert values == pytest.approx({
        "perf/tokens_per_second_per_gpu": 100.0, "perf/padding": 0.25,
        "perf/update_tflops": 23 / 4, "perf/hardware_tflops": 29 / 4, "perf/step_tflops": (23 + 2 * 8) / 10,
        "perf/mfu": 23 / 4 / 20, "perf/step_mfu": 39 / 10 / 20,
    })  # fmt: skip


def test_no_mfu_without_a_peak():
    work = Work(tokens=1000, slots=1000, flops=Flops(TERA))
    assert not [name for name in utilisation(work, Clock(), ALONE, peak=None) if "mfu" in name]


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_known_gpus(name, tflops):
    assert known_gpu(name).tflops == tflops


@pytest.mark.parametrize(
    "name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A10G", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "Tesla T4"]
)
def test_near_names_are_not_taken_for_known_gpus(name):
    assert known_gpu(name) is None


def test_the_setting_overrides_and_a_cpu_has_no_peak():
    assert peak_tflops(CPU, None) is None
    assert peak_tflops(CPU, 3.5) == 3.5


def test_phases_have_their_resident_memory():
    clock = Stopwatch(CPU)
    before = psutil.Process().memory_info().rss / GIB
    with clock("large"):
        kept = mmap.mmap(-1, 64 << 20)  # not from the heap, which may have free memory
        kept.write(bytes(64 << 20))
    assert clock.memory["memory/large_rss_gib"] >= before + len(kept) / GIB / 2
    kept.close()
    with clock("large"):
        pass
    assert clock.memory["memory/large_rss_gib"] >= before + 1 / 32, "the most of its visits"
    assert set(clock.seconds) == {"large"}
