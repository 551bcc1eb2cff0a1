"""What "auto" and null stand for, for trainer, server, planner and doctor; and the loss that the settings describe.

device is "cpu" or "cuda" in every function. Libraries load when a function needs them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mssr.algorithms.advantages import ALGORITHMS
from mssr.config.algorithm_keys import AlgorithmConfig
from mssr.config.data_keys import DataConfig
from mssr.errors import UserError
from mssr.versions import SUPPORTED, TESTED, is_cpu_build, is_supported, vllm_version

if TYPE_CHECKING:
    from mssr_kernels import PolicyLossConfig

MOST_REWARD_WORKERS = 8  # more would take memory from the data's workers, and seldom help


def device_type(setting: str) -> str:
    """Return the device that `device` stands for on this machine: "cuda" if torch sees a GPU, unless it is "cpu"."""
    import torch

    return "cuda" if setting != "cpu" and torch.cuda.is_available() else "cpu"


def dtype_name(setting: str, device: str) -> str:
    """Return the dtype that `model.dtype` stands for: auto is bfloat16 with fp32 masters on a GPU, float32 on a CPU."""
    if setting != "auto":
        return setting
    return "bfloat16" if device == "cuda" else "float32"


def engine_name(setting: str, device: str) -> str:
    """Return the rollout engine that `rollout.engine` stands for: auto is vllm if it can be used here, else hf."""
    if setting != "auto":
        return setting
    return "hf" if why_no_vllm(device) else "vllm"


def planned_engine(setting: str) -> str:
    """Return the rollout engine of a GPU machine that is planned for; auto does not depend on what is installed here."""
    return "vllm" if setting == "auto" else setting


def why_no_vllm(device: str) -> str | None:
    """Return why vLLM cannot sample for this device, and how to change it; None if it can. Does not import vLLM.

    device: "auto" for the device that the installed vLLM is built for.
    """
    version = vllm_version()
    if version is None:
        return "vLLM is not installed; run `python -m mssr.rollout.vllm.install`"
    if not is_supported("vllm", version):
        low, high = SUPPORTED["vllm"]
        return f"vLLM {version} is not supported (>={low}, <{high} is); pip install vllm=={TESTED['vllm']}"
    build = "cpu" if is_cpu_build(version) else "cuda"
    if device not in ("auto", build):
        return (
            f"vLLM {version} is built for {build}, device is {device}; "
            "run `python -m mssr.rollout.vllm.install` for another build"
        )
    return None


def pixel_limits(data: DataConfig, own: tuple[int, int]) -> tuple[int, int]:
    """Return the fewest and the most pixels of a preprocessed image: data.min_pixels, data.max_pixels, or the model's own.

    own: the limits of the model's image processor.

    Raises:
        UserError: one limit is set and contradicts the model's own other one.
    """
    low = own[0] if data.min_pixels is None else data.min_pixels
    high = own[1] if data.max_pixels is None else data.max_pixels
    if low > high:
        own_min = data.min_pixels is None
        smaller = f"the model's own min_pixels {low}" if own_min else f"data.min_pixels {low}"
        larger = f"data.max_pixels {high}" if own_min else f"the model's own max_pixels {high}"
        raise UserError(f"{smaller} is larger than {larger}; set data.min_pixels and data.max_pixels together")
    return low, high


def reward_workers(setting: int | None) -> int:
    """Return the number of processes that `reward.workers` stands for: null is this rank's share of the cores, at most 8."""
    if setting is not None:
        return setting
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_REWARD_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def policy_loss(algorithm: AlgorithmConfig) -> PolicyLossConfig:
    """Return the loss of every update of a run: clipped, dual-clipped, with KL term and entropy bonus as configured.

    Only an algorithm with shaping has an entropy_alpha. Truncated importance weights (TIS) correct recomputed log-probs that
    differ from the sampler's. With the rollout's own log-probs as old ones the ratio already is current / sampler: a second
    weight would count the mismatch twice.
    """
    from mssr_kernels import PolicyLossConfig

    return PolicyLossConfig(
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        dual_clip=algorithm.dual_clip,
        entropy_alpha=algorithm.entropy_alpha if ALGORITHMS[algorithm.name].shaped else 0.0,
        entropy_kappa=algorithm.entropy_kappa,
        entropy_source=algorithm.entropy_source,
        kl_coef=algorithm.kl_coef,
        entropy_coef=algorithm.entropy_coef,
        tis_cap=algorithm.tis_cap if algorithm.old_logp == "recompute" else None,
    )
