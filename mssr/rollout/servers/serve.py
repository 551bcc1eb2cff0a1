"""`mssr serve`: one vLLM server with the settings that `rollout.engine: servers` needs."""

import os
import secrets
import socket
import sys

from mssr.config import Config
from mssr.config.resolve import dtype_name, why_no_vllm
from mssr.errors import UserError
from mssr.policy.loading import check_model_path
from mssr.rollout.vllm.adapter import ENVIRONMENT, as_flags, engine_arguments, require_server_vllm, transfer_backend
from mssr.versions import is_cpu_build, release, vllm_version

_ADDRESS = "MSSR_SERVES_AT"  # environment variable of the server's process, for SayReady
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
    check_model_path(config.model.path)
    _refuse_taken_port(host, port)
    command = [sys.executable, *_SERVER, *arguments(config, host, port)]
    print(f"mssr: {config.model.path} will be served at http://{host}:{port}; starting vLLM", flush=True)
    os.execve(sys.executable, command, _environment() | {_ADDRESS: f"http://{host}:{port}"})


class SayReady:
    """ASGI middleware in vLLM's process: says when the server has started."""

    def __init__(self, app) -> None:
        self._app = app

    async def __call__(self, scope, receive, send) -> None:
        async def send_and_say(message) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete":
                print(f"mssr: ready at {os.environ[_ADDRESS]}; the trainer sends the weights", flush=True)

        await self._app(scope, receive, send_and_say if scope["type"] == "lifespan" else send)


def arguments(config: Config, host: str, port: int) -> list[str]:
    """Return the command line of vLLM's server."""
    version = vllm_version()
    cpu = is_cpu_build(version)
    settings = engine_arguments(config, dtype_name(config.model.dtype, "cpu" if cpu else "cuda"), gpu=not cpu) | {
        "host": host,
        "port": port,
        "weight_transfer_config": {"backend": transfer_backend()},
        # Servers of one run must draw different noise; vLLM's default is 0 for all.
        "seed": secrets.randbits(31),
        "uvicorn_log_level": "warning",
        "disable_uvicorn_access_log": True,
        "middleware": f"{__name__}.{SayReady.__name__}",
    }
    if config.rollout.tensor_parallel == 1:
        settings["distributed_executor_backend"] = "uni"
    if release(version) >= (0, 30):
        settings["enable_scale_out"] = True  # the tokens-in, tokens-out interface; always on before 0.30
    return as_flags(settings)


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
