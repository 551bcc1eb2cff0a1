"""A vLLM plugin: weight transfer over gloo, so that servers can be tested on machines without a GPU.

vLLM finds it by the metadata beside it once this folder is on PYTHONPATH. Rank 0 of a separate process group sends,
the workers of all servers receive. Both sides split the same list of weights into chunks of bounded size, and each chunk
is one broadcast. The settings on the wire are those of vLLM's NCCL transfer.
"""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from datetime import timedelta
from typing import Self

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_payload
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLWeightTransferUpdateInfo

from mssr.distributed import address_towards

NAME = "mssr_gloo"
TIMEOUT_S = 60.0  # for each step of a transfer
REASON_S = 5.0  # how long a broken transfer waits for the server's own explanation


def register() -> None:
    """Make both sides of the transfer known to vLLM, which calls this in each of its processes."""
    if NAME not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(NAME, GlooReceiver)
        WeightTransferTrainerFactory.register_engine(NAME, GlooSender)


class Group:
    """A gloo process group beside torch's default one."""

    def __init__(self, info: NCCLTrainerInitInfo | NCCLWeightTransferInitInfo, rank: int) -> None:
        self._timeout = timedelta(seconds=TIMEOUT_S)
        self._rank, self._size, self._address = rank, info.world_size, info.master_address
        self._store = TCPStore(
            self._address, info.master_port, self._size, is_master=rank == 0, timeout=self._timeout,
            wait_for_workers=False, use_libuv=True,
        )  # fmt: skip
        self._group: ProcessGroupGloo | None = None

    def join(self) -> None:
        options = ProcessGroupGloo._Options()
        options._timeout = self._timeout
        # The interface that reaches the sender: the host's own name may resolve to an address that others cannot reach.
        options._devices = [ProcessGroupGloo.create_device(hostname=address_towards(self._address))]
        self._store.set(f"here/{self._rank}", "")
        self._group = ProcessGroupGloo(PrefixStore("gloo", self._store), self._rank, self._size, options)

    def wait_for_others(self, asked: Future) -> None:
        """Wait until all workers are about to join.

        asked: the servers' answers to the request to join; an error there ends the wait.
        """
        others = [f"here/{rank}" for rank in range(1, self._size)]
        deadline = time.monotonic() + TIMEOUT_S
        while not self._store.check(others):
            if asked.done():
                asked.result()
            if time.monotonic() > deadline:
                raise TimeoutError("the servers did not join the weight transfer")
            time.sleep(0.01)

    def broadcast(self, buffer: Tensor) -> None:
        """Send from rank 0 to all others. buffer: [bytes] uint8."""
        self._group.broadcast(buffer, 0).wait()


class GlooReceiver(WeightTransferEngine[NCCLWeightTransferInitInfo, NCCLWeightTransferUpdateInfo]):
    """The side of a vLLM worker, which loads the weights layer by layer as they arrive, as from a checkpoint."""

    init_info_cls = NCCLWeightTransferInitInfo
    update_info_cls = NCCLWeightTransferUpdateInfo

    _group: Group | None = None
    _buffer_bytes = 0
    _torn = False

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._buffer_bytes = init_info.packed_buffer_size_bytes
        self._group = Group(init_info, rank)
        self._group.join()

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        if self._torn:  # vLLM would mistake the rest of the lost transfer for part of this one
            raise RuntimeError("an earlier weight transfer broke off; restart this server")
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict) -> None:
        # vLLM's own method would also synchronise an accelerator, and there is none.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        if self._group is None:
            raise RuntimeError("the weight transfer is not initialised")
        rows = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        weights = [ParamMeta(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in rows]
        try:
            for chunk in chunks(weights, self._buffer_bytes):
                buffer = torch.empty(sum(map(size_bytes, chunk)), dtype=torch.uint8)
                self._group.broadcast(buffer)
                parts = buffer.split([size_bytes(weight) for weight in chunk])
                # Copies: vLLM keeps weights until their layer is complete, and a part may not be aligned to its dtype.
                self.model.load_weights(
                    [
                        (weight.name, part.clone().view(weight.dtype).view(weight.shape))
                        for weight, part in zip(chunk, parts)
                    ]
                )
        except BaseException:
            self._torn = True
            self.shutdown()  # closes the connections: the sender must not wait for this worker
            raise

    def shutdown(self) -> None:
        self._group = None  # the last reference: closes the connections


class GlooSender(TrainerWeightTransferEngine[NCCLTrainerInitInfo]):
    """The trainer's side. All ranks iterate over the source, and rank 0 sends."""

    init_info_cls = NCCLTrainerInitInfo

    _group: Group | None = None
    _buffer_bytes = 0

    @classmethod
    def trainer_init(
        cls, init_info: NCCLTrainerInitInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> Self:
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        engine._buffer_bytes = init_info.packed_buffer_size_bytes
        if not engine.is_sender:
            return engine
        settings = asdict(init_info)
        del settings["rank"]
        receiver = NCCLWeightTransferInitInfo(**settings, rank_offset=1)
        engine._group = Group(init_info, rank=0)
        with ThreadPoolExecutor(max_workers=1) as thread:
            # A server answers when its workers have joined, so this rank joins meanwhile.
            asked = thread.submit(client.init_weight_transfer_engine, worker_init_payload(receiver))
            engine._group.wait_for_others(asked)
            engine._group.join()
            asked.result()
        return engine

    def send_weights(self) -> None:
        weights = self.source.metadata()
        if not self.is_sender:
            for _ in self.source:
                pass
            return
        update = NCCLWeightTransferUpdateInfo(
            names=[weight.name for weight in weights],
            dtype_names=[str(weight.dtype).removeprefix("torch.") for weight in weights],
            shapes=[list(weight.shape) for weight in weights],
        )
        self.client.start_weight_update()
        thread = ThreadPoolExecutor(max_workers=1)
        try:
            received = thread.submit(self.client.update_weights, asdict(update))
            broken = self._broadcast_until_broken(weights)
            if broken:
                self.shutdown()  # neither the other workers nor their servers' answers must wait for the rest
                wait((received,), timeout=REASON_S)
                if received.done():
                    received.result()  # raises the reason: which server, and what it says
                raise RuntimeError(broken)
            received.result()
        finally:
            thread.shutdown(wait=False)
        self.client.finish_weight_update()

    def _broadcast_until_broken(self, weights: list[ParamMeta]) -> str | None:
        """Return the error that broke the transfer, as text: an exception's traceback would keep the group alive."""
        try:
            self._broadcast(weights)
        except RuntimeError as error:  # gloo's
            return str(error)
        return None

    def _broadcast(self, weights: list[ParamMeta]) -> None:
        source, group = iter(self.source), self._group
        for chunk in chunks(weights, self._buffer_bytes):
            parts = []
            for expected in chunk:
                name, tensor = next(source)
                if (name, tensor.dtype, tuple(tensor.shape)) != (expected.name, expected.dtype, expected.shape):
                    raise ValueError(f"weight transfer: {name} came in the place of {expected.name}")
                parts.append(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8))
            group.broadcast(torch.cat(parts))
        if next(source, None) is not None:
            raise ValueError("weight transfer: more weights came than were announced")

    def shutdown(self) -> None:
        self._group = None  # the last reference: closes the connections


def chunks(weights: list[ParamMeta], limit: int) -> Iterator[list[ParamMeta]]:
    """Split the list into consecutive chunks of at most `limit` bytes; a larger weight is a chunk by itself."""
    chunk, filled = [], 0
    for weight in weights:
        if chunk and filled + size_bytes(weight) > limit:
            yield chunk
            chunk, filled = [], 0
        chunk.append(weight)
        filled += size_bytes(weight)
    if chunk:
        yield chunk


def size_bytes(weight: ParamMeta) -> int:
    return torch.Size(weight.shape).numel() * weight.dtype.itemsize
