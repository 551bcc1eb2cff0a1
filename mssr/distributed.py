"""One process per device: start-up and the collectives that the training loop needs."""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mssr.config.resolve import device_type
from mssr.errors import UserError, shortened
from mssr.guard import signal_at_end_of_parent

# Longest wait for other ranks, for example while rank 0 writes a model or one rank samples longer. If a rank dies, its
# launcher ends the job long before.
TIMEOUT = timedelta(hours=1)
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what a launcher sets
Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """This process's rank, the number of ranks, and the device it owns."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over ranks, on the input's device; with one rank the input itself."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """Element-wise maximum over ranks, on the input's device; with one rank the input itself."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Tensor, operation: dist.ReduceOp) -> Tensor:
        if self.size == 1:
            return values
        reduced = values.to(self.device, copy=True)
        dist.all_reduce(reduced, op=operation)
        return reduced.to(values.device)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Context that ends alike on all ranks: a UserError on one of them is raised on all. Collective."""
        problem = None
        try:
            yield
        except UserError as error:
            problem = str(error)
        problem = next(filter(None, self.gather(problem)), None)
        if problem:
            raise UserError(problem)

    def on_main(self, work: Callable[[], Result], failure: str, remedy: str = "") -> Result | None:
        """Return what `work` returns on rank 0, and None on the others. Collective: its errors are raised on all ranks.

        failure, remedy: what the error says before and after the reason if a file cannot be written.
        """
        with self.together():
            if not self.is_main:
                return None
            try:
                return work()
            except OSError as error:
                raise UserError(
                    f"{failure}: {shortened(error.strerror or error, 200)}{remedy and '; '}{remedy}"
                ) from None


ALONE = World(0, 1, torch.device("cpu"))


def require_device(device: str) -> None:
    """Refuse `config.device` "cuda" where there is no GPU.

    Raises:
        UserError: torch sees none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda, but torch sees no GPU; run `mssr doctor`, or set device=cpu")


def start_world(device: str = "auto") -> World:
    """Join the launcher's process group (`torchrun`, `deepspeed`), or start a group of one.

    device: as `config.device`.

    Raises:
        UserError: device is "cuda" and there is no GPU, or the rendezvous port is in use.
    """
    end_with_launcher()
    require_device(device)
    use_gpu = device_type(device) == "cuda"
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if use_gpu else "cpu")
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if use_gpu:
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        _join(backend="nccl" if use_gpu else "gloo")
    here = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    return World(dist.get_rank(), dist.get_world_size(), here)


@contextmanager
def own_environment() -> Iterator[None]:
    """Context at whose end environment variables are as before `start_world`.

    A notebook that trained alone must not look like a launcher's rank to the commands that it starts later.
    """
    before = {name: os.environ.get(name) for name in LAUNCHED}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def end_with_launcher() -> None:
    """Get SIGTERM when the launcher dies: torchrun's ranks are in sessions of their own, so whoever kills it misses them."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        signal_at_end_of_parent(signal.SIGTERM)


def _join(backend: str) -> None:
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
    except (dist.DistNetworkError, OSError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            port = os.environ.get("MASTER_PORT")
            raise UserError(
                f"port {port} (MASTER_PORT) is in use; set another one, for example MASTER_PORT=29511"
            ) from None
        raise
    _keep_deepspeed_from_compiling()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def address_towards(host: str) -> str:
    """Return this machine's address as seen from `host`; sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return probe.getsockname()[0]


def _keep_deepspeed_from_compiling() -> None:
    """Disable DeepSpeed's C++ shared-memory all-reduce on CPUs: it takes half a minute to build and needs a compiler.

    gloo replaces it.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
