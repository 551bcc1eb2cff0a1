"""`mssr serve`: one vLLM server with the settings that `rollout.engine: servers` needs."""

import json
import os
import secrets
import socket
import sys
from pathlib import Path

from mssr.config import Config
from mssr.config.resolve import dtype_name, why_no_vllm
from mssr.errors import UserError
from mssr.rollout.vllm.adapter import ENVIRONMENT, require_server_vllm, server_flags, transfer_backend
from mssr.versions import is_cpu_build, vllm_version

# Not the `vllm` command: it looks for a distribution of that name, and the CPU build has another. vLLM calls this entry
# deprecated.
_SERVER = ["-W", "ignore::DeprecationWarning", "-m", "vllm.entrypoints.openai.api_server"]


def serve(config: Config, host: str, port: int) -> None:
    """Replace this process by vLLM's server. Its weights are random until a trainer sends its own.

    Raises:
        UserError: vLLM cannot be used here, the port is taken, or model.path is not a model.
    """
    if why := why_no_vllm(config.device):  # checked first: the next line would suggest rollout.engine=hf
        raise UserError(why)
    require_server_vllm(config.device)
    path = Path(config.model.path)
    if path.exists() and not (path / "config.json").is_file():
        raise UserError(f"model.path {path}: no config.json in it; expected a Hugging Face model directory")
    _refuse_taken_port(host, port)
    command = [sys.executable, *_SERVER, *arguments(config, host, port)]
    print(f"mssr: {config.model.path} will be served at http://{host}:{port}", flush=True)
    os.execve(sys.executable, command, _environment())


def arguments(config: Config, host: str, port: int) -> list[str]:
    """Return the command line of vLLM's server."""
    rollout, cpu = config.rollout, is_cpu_build(vllm_version())
    settings = {
        "model": config.model.path,
        "host": host,
        "port": port,
        "dtype": dtype_name(config.model.dtype, "cpu" if cpu else "cuda"),
        "load-format": "dummy",  # the trainer sends its weights before the first request
        "max-model-len": config.data.max_prompt_tokens + rollout.max_response_tokens,
        "max-num-seqs": rollout.batch_size,
        "tensor-parallel-size": rollout.tensor_parallel,
        "logprobs-mode": "processed_logprobs",  # after temperature and forbidden tokens: of the distribution drawn from
        "generation-config": "vllm",  # the model's own would change the distribution
        "limit-mm-per-prompt": json.dumps({"video": 0}),
        "mm-processor-cache-gb": 0,  # pixels are preprocessed by the trainer
        "weight-transfer-config": json.dumps({"backend": transfer_backend()}),
        # Servers of one run must draw different noise; vLLM's default is 0 for all.
        "seed": secrets.randbits(31),
        "uvicorn-log-level": "warning",
    }
    if rollout.quantization:
        settings["quantization"] = rollout.quantization
    if rollout.tensor_parallel == 1:
        settings["distributed-executor-backend"] = "uni"
    if not cpu:
        settings["gpu-memory-utilization"] = rollout.gpu_memory
    flags = ["--no-enable-prefix-caching", "--disable-log-stats", "--disable-uvicorn-access-log", *server_flags()]
    if cpu:
        flags.append("--enforce-eager")
    return [*(f"--{name}={value}" for name, value in settings.items()), *flags]


def _environment() -> dict[str, str]:
    environment = ENVIRONMENT | os.environ | {"VLLM_SERVER_DEV_MODE": "1"}  # enables weight transfer and cache resets
    # With 0 the CPU build runs its worker in the engine's process, which saves importing everything once more.
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if is_cpu_build(vllm_version()) else "1"
    return environment


def _refuse_taken_port(host: str, port: int) -> None:
    try:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}; choose another one") from None
