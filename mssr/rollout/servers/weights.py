"""Sends the trainer's weights to all servers by vLLM's weight transfer: one broadcast group over all their workers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from mssr.distributed import World, address_towards, free_port
from mssr.errors import UserError, shortened
from mssr.policy.model import Policy
from mssr.policy.weights import named_weights, weight_shapes
from mssr.rollout.servers.client import ServerLost, call_all
from mssr.rollout.vllm.adapter import trainer_init_info

_CACHES = ("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache")


class WeightTransfer:
    """Sends all weights of the policy, as often as needed. Every method is a collective over the trainer's ranks."""

    def __init__(self, world: World, bucket_bytes: int, timeout_s: float) -> None:
        """bucket_bytes: sent at once, and gathered at once under ZeRO-3; a larger weight is sent alone."""
        self._world = world
        self._bucket_bytes = bucket_bytes
        self._timeout_s = timeout_s
        self._engine = None
        self._source: PolicySource | None = None
        self._client: FanOut | None = None
        self._sent: int | None = None  # version of the servers' weights

    def send(self, policy: Policy, version: int, servers: dict[str, int]) -> None:
        """Make all servers sample from these weights, and drop what they computed with others.

        servers: address to number of workers; the same on all ranks.

        Raises:
            UserError: a server died or cannot take part; the others then have only some of the weights.
        """
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)  # vLLM reads the parameters on its own streams
        if self._world.gather(not self._connected(servers) if self._world.is_main else None)[0]:
            self.close()
            with self._agree():
                self._connect(policy, servers)
        self._source.policy = policy
        self._client.version = version
        self._sent = None
        with self._agree():
            self._transfer()
        self._sent = version

    def close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is None:
            return
        engine.shutdown()
        if self._world.is_main:  # older vLLM has no such call
            bodies = dict.fromkeys(self._client.servers)
            call_all(bodies, "/shutdown_weight_transfer_engine", timeout_s=self._timeout_s, missing_ok=True)

    def _connected(self, servers: dict[str, int]) -> bool:
        """Whether the group consists of exactly these servers. A restarted server is recognised by its
        weight version, since its address is the same. If vLLM reports no version, the group is made again."""
        if self._engine is None or self._sent is None or self._client.servers != servers:
            return False
        told = call_all(
            dict.fromkeys(servers), "/weight_info", method="GET", timeout_s=self._timeout_s, missing_ok=True
        )
        return all(isinstance(answer, dict) and answer["weight_version"] == str(self._sent) for answer in told.values())

    def _connect(self, policy: Policy, servers: dict[str, int]) -> None:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        self._client = FanOut(servers, self._timeout_s)
        self._source = PolicySource(policy, self._bucket_bytes)
        self._engine = WeightTransferTrainerFactory.trainer_init(
            trainer_init_info(
                rank=self._world.rank,
                address=_address_seen_by(list(servers)),
                port=free_port(),
                size=1 + sum(servers.values()),
                buffer_bytes=max(self._bucket_bytes, self._source.largest_bytes),
            ),
            client=self._client,
            source=self._source,
        )
        self._client.give_up = self._engine.shutdown

    def _transfer(self) -> None:
        try:
            self._engine.send_weights()
        except BaseException:
            self._source.finish()
            raise
        if self._world.is_main:
            for path in _CACHES:
                self._client.post(path)

    @contextmanager
    def _agree(self) -> Iterator[None]:
        """Context that ends alike on all ranks; a server's failure is seen on rank 0 alone."""
        with self._world.together():
            try:
                yield
            except (RuntimeError, ValueError, TimeoutError, OSError) as error:
                if not self._world.is_main:
                    raise
                raise UserError(f"rollout.servers: weight transfer: {shortened(error, 300)}") from None


class FanOut:
    """vLLM's `VLLMWeightSyncClient` for several servers: every call goes to all of them at the same time.

    servers: address to number of workers. version: of the weights that are sent. give_up: aborts a running broadcast.
    """

    def __init__(self, servers: dict[str, int], timeout_s: float) -> None:
        self.servers = servers
        self.version: int | None = None
        self.give_up: Callable[[], None] = lambda: None
        self._timeout_s = timeout_s

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        bodies, rank = {}, init_info["rank_offset"]
        for server, workers in self.servers.items():
            bodies[server] = {"init_info": init_info | {"rank_offset": rank}}
            rank += workers
        self._post(bodies, "/init_weight_transfer_engine")

    def start_weight_update(self) -> None:
        self.post("/start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # A lost server never rejoins the broadcast: without this, NCCL would make all others wait for it forever.
        bodies = {server: {"update_info": update_info} for server in self.servers}
        self._post(bodies, "/update_weights", on_lost=self.give_up)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.post("/finish_weight_update", {"weight_version": str(self.version)})

    def post(self, path: str, body: Any = None) -> None:
        """Send the same body to all servers; a lost server is a UserError."""
        self._post(dict.fromkeys(self.servers, body), path)

    def _post(self, bodies: dict[str, Any], path: str, **settings) -> None:
        answers = call_all(bodies, path, timeout_s=self._timeout_s, **settings).values()
        lost = "; ".join(str(answer) for answer in answers if isinstance(answer, ServerLost))
        if lost:
            raise UserError(
                f"rollout.servers, while weights were sent: {lost}; restart the servers (`mssr serve`), "
                "then go on with `mssr train --resume`"
            )
        for answer in answers:
            if isinstance(answer, dict) and answer.get("success") is False:
                raise UserError(f"rollout.servers: {path} did not succeed; is someone else using the servers?")


class PolicySource:
    """vLLM's `WeightSource`: a description of the weights (`metadata`), and the weights, in the same order.

    Under ZeRO-3 an iteration is a collective that all ranks must complete.
    """

    def __init__(self, policy: Policy, bucket_bytes: int) -> None:
        self.policy = policy
        self._bucket_bytes = bucket_bytes
        self._pass: Iterator[tuple[str, Tensor]] = iter(())

    @property
    def largest_bytes(self) -> int:
        return max(shape.numel() * dtype.itemsize for shape, dtype in weight_shapes(self.policy).values())

    def metadata(self) -> list:
        """Return a `ParamMeta` per weight."""
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, dtype, tuple(shape)) for name, (shape, dtype) in weight_shapes(self.policy).items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._pass = named_weights(self.policy, self._bucket_bytes)
        return self._pass

    def finish(self) -> None:
        """Complete an iteration that was interrupted, since other ranks wait for this one in it."""
        for _ in self._pass:
            pass


def _address_seen_by(servers: list[str]) -> str:
    """Return this host's address as the servers see it: a network address, unless all servers are on this host."""
    addresses = [address_towards(urlsplit(server).hostname) for server in servers]
    return next((address for address in addresses if not address.startswith("127.")), addresses[0])
