"""What differs between the supported versions of vLLM: 0.26 to 0.32, and the CPU build of 0.32.

The rest of the trainer uses these functions, and calls that are the same in all versions (`LLM`,
`LLMEngine.add_request` and `step`, `collective_rpc`, `reload_weights`, the three cache resets, sleep mode).
"""

import json
import logging
import os
from importlib.metadata import entry_points
from typing import Any

from mssr.config import Config
from mssr.config.resolve import why_no_vllm
from mssr.errors import UserError
from mssr.versions import TESTED, is_cpu_build, release, vllm_version

ENVIRONMENT = {
    # Run the engine in the trainer's process, where it can read the trainer's parameters.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # What a user can act on is logged as an error; the rest is a hundred lines.
    "VLLM_LOGGING_LEVEL": "ERROR",
    # On a CPU, follow OMP_NUM_THREADS: vLLM would pin its threads to cores that other ranks use.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
}


def require_vllm(device: str) -> None:
    """Check that vLLM can sample for this device, and set the environment that vLLM reads when it is imported.

    Raises:
        UserError: it cannot; `why_no_vllm` has the reasons.
    """
    if why := why_no_vllm(device):
        raise UserError(f"rollout.engine: {why}, or set rollout.engine=hf")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").setLevel(logging.ERROR)  # for messages before vLLM reads VLLM_LOGGING_LEVEL


def engine_arguments(config: Config, dtype: str, *, gpu: bool) -> dict[str, Any]:
    """Return what engine and server have in common, by the names of vLLM's `EngineArgs`. Does not import vLLM."""
    rollout = config.rollout
    arguments = {
        "model": config.model.path,
        "dtype": dtype,
        "load_format": "dummy",  # the trainer sends its weights before the first request
        "quantization": rollout.quantization,
        "tensor_parallel_size": rollout.tensor_parallel,
        "max_model_len": config.data.max_prompt_tokens + rollout.max_response_tokens,
        "max_num_seqs": rollout.batch_size,
        "gpu_memory_utilization": rollout.gpu_memory,
        "enforce_eager": not gpu,
        "logprobs_mode": "processed_logprobs",  # after temperature and forbidden tokens: of the distribution drawn from
        "generation_config": "vllm",  # the model's own would change the distribution
        "enable_prefix_caching": False,  # so that no keys and values can be stale; a group recomputes its prompt
        "mm_processor_cache_gb": 0,  # the trainer preprocesses pixels
        "limit_mm_per_prompt": {"video": 0},
        "disable_log_stats": True,
    }
    if release(vllm_version()) >= (0, 28):  # from there on it normalises images by default; ours are normalised already
        arguments["mm_device_do_normalize"] = False
    return arguments


# Servers: vLLM in processes of its own, whose HTTP interface and weight transfer took their present form in 0.28.

SERVERS_FIRST = (0, 28)
CPU_TRANSFER = "mssr_gloo"  # vLLM transfers weights between GPUs only; for a CPU, our tests bring a plugin of this name


def require_server_vllm(device: str) -> None:
    """Check that vLLM can serve for this device and take weights from a trainer; see also `require_vllm`.

    Raises:
        UserError: it cannot; says why and what to do.
    """
    require_vllm(device)
    version = vllm_version()
    if release(version) < SERVERS_FIRST:
        raise UserError(
            f"rollout.engine servers: vLLM {version} transfers weights in another way; take 0.28 or newer: "
            f"pip install vllm=={TESTED['vllm']}"
        )
    if transfer_backend() == CPU_TRANSFER and CPU_TRANSFER not in entry_points(group="vllm.general_plugins").names:
        raise UserError(
            "rollout.engine servers needs a GPU: vLLM transfers no weights between CPUs; set rollout.engine=vllm"
        )


def transfer_backend() -> str:
    """Return vLLM's name of the weight transfer to servers."""
    return CPU_TRANSFER if is_cpu_build(vllm_version()) else "nccl"


def as_flags(arguments: dict[str, Any]) -> list[str]:
    """Return the arguments as flags of vLLM's command line."""
    flags = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            flags.append(f"--{flag}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def trainer_init_info(*, rank: int, address: str, port: int, size: int, buffer_bytes: int):
    """Return the settings of the trainer's side of the weight transfer."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    if transfer_backend() == CPU_TRANSFER:
        from vllm.plugins import load_general_plugins

        load_general_plugins()  # one of them brings it, as in vLLM's own processes
    info = NCCLTrainerInitInfo(
        rank=rank,
        master_address=address,
        master_port=port,
        world_size=size,
        packed=True,
        packed_buffer_size_bytes=buffer_bytes,
    )
    info.backend = transfer_backend()
    return info
