"""Rollouts by vLLM in the trainer's process, on the same GPU: one engine per rank or tensor-parallel group of ranks.

Trainer and engine take turns with the GPU's memory:

    update_weights   wake the weights' memory, fill it from the trainer's parameters, wake the KV cache
    generate         as often as needed
    release          sleep at level 2: weights and KV cache are discarded, not copied; the next sync writes the weights
"""

import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch
import torch.distributed as dist
from pydantic import ValidationError

from mssr.batch import Prompt
from mssr.config import Config
from mssr.distributed import World
from mssr.errors import UserError, shortened
from mssr.policy.model import Policy
from mssr.rollout.base import OnResponse, Request, Response, RolloutEngine, Sampling, merged_stream
from mssr.rollout.stop import StopTexts
from mssr.rollout.vllm.adapter import engine_arguments, require_vllm
from mssr.rollout.vllm.requests import engine_input, sampling_params
from mssr.rollout.weight_sync import sync_weights


class VLLMRollout(RolloutEngine):
    """Draws a call's noise from one generator, seeded by the call's streams. So the same call gives the same responses on
    any rank, but a response depends on the others that are sampled with it.
    """

    name = "vllm"

    def __init__(
        self, config: Config, policy: Policy, ends: list[int], pad: int, world: World, stop: StopTexts | None = None
    ) -> None:
        """Start vLLM, asleep.

        Raises:
            UserError: vLLM is missing, of an unsupported version, or cannot run this model here.
        """
        super().__init__(config.rollout, ends, pad, stop)
        require_vllm(world.device.type)
        self._world = world
        self._image_token_id, self._merge_size = policy.image_token_id, policy.merge_size
        self._forbidden = policy.forbidden_token_ids
        self._group = _tensor_parallel_group(config.rollout.tensor_parallel, world)
        self._requests = 0
        with _trainers_random_state(), warnings.catch_warnings(action="ignore"):  # vLLM warns about its own code
            self._llm = _start(config, next(policy.parameters()).dtype, world)
            self._llm.sleep(level=2)
        self._asleep = True

    def update_weights(self, policy: Policy, version: int) -> None:
        if self._world.device.type == "cuda":
            torch.cuda.empty_cache()  # give what the trainer's allocator holds unused to vLLM
        if self._asleep:
            self._llm.wake_up(["weights"])
        # Half of rollout.sync_gib: the last bucket is still in use while the next one is gathered.
        sync_weights(self._llm, policy, bucket_bytes=int(self._config.sync_gib * 2**29))
        if self._asleep:
            self._llm.wake_up(["kv_cache"])
        self._asleep, self._weight_version = False, version

    def _sample(self, requests: list[Request], sampling: Sampling, finished: OnResponse) -> None:
        # Ranks that share an engine must all run the requests of all, in the same order.
        everyone = [(rank, request) for rank, part in enumerate(self._gather(requests)) for request in part]
        me = dist.get_rank(self._group) if self._group is not None else 0

        def finished_by_any(number: int, response: Response) -> None:
            rank, request = everyone[number]
            if rank == me:
                finished(request.row, response)

        with _trainers_random_state():
            _seed(merged_stream([request.stream for _, request in everyone]))
            self._run([request.prompt for _, request in everyone], sampling, finished_by_any)

    def release(self) -> None:
        if not self._asleep:
            self._llm.sleep(level=2)
            self._asleep, self._weight_version = True, None

    def close(self) -> None:
        """Shut vLLM down, so that another run can follow in this process."""
        llm, self._llm = self._llm, None
        if llm is None or (self._world.size > 1 and sys.exc_info()[0]):
            return  # after an error other ranks may be gone, for which the end of vLLM's groups would wait
        with _default_group_kept():
            llm.llm_engine.engine_core.shutdown()

    def _run(self, prompts: list[Prompt], sampling: Sampling, finished: OnResponse) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        limit = self._config.max_response_tokens
        arguments = sampling_params(sampling, limit, self._ends, self._forbidden, self._stop.texts)
        settings = SamplingParams(**arguments, output_kind=RequestOutputKind.FINAL_ONLY)
        engine = self._llm.llm_engine
        first, self._requests = self._requests, self._requests + len(prompts)
        for number, prompt in enumerate(prompts):
            inputs = engine_input(prompt, self._image_token_id, self._merge_size)
            engine.add_request(str(first + number), inputs, settings)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    (found,) = output.outputs
                    logps = [entry[token].logprob for token, entry in zip(found.token_ids, found.logprobs, strict=True)]
                    finished(int(output.request_id) - first, self._response(list(found.token_ids), logps))

    def _gather(self, value: list) -> list[list]:
        """Return the lists of all ranks that share the engine."""
        if self._group is None:
            return [value]
        values = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values


def _start(config: Config, dtype: torch.dtype, world: World):
    from vllm import LLM

    gpu = world.device.type == "cuda"
    try:
        return LLM(
            **engine_arguments(config, str(dtype).removeprefix("torch."), gpu=gpu),
            distributed_executor_backend="external_launcher",  # torchrun has started the ranks
            enable_sleep_mode=gpu,
            seed=config.seed,
        )
    except (ValueError, NotImplementedError) as error:  # pydantic's and vLLM's: an unsupported setting
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        said = shortened(said.removeprefix("Value error, "), 300)
        raise UserError(f"rollout.engine vllm: {said}; change that setting, or set rollout.engine=hf") from None


def _tensor_parallel_group(size: int, world: World) -> dist.ProcessGroup | None:
    """Return the group of ranks that share this rank's engine (0..size-1, size..2*size-1, ...); None for one rank each."""
    if world.size % size:
        raise UserError(f"rollout.tensor_parallel {size} does not divide the {world.size} ranks")
    if size == 1:
        return None
    groups = [dist.new_group(list(range(start, start + size))) for start in range(0, world.size, size)]
    return groups[world.rank // size]


def _seed(seed: int) -> None:
    """Seed every generator from which some version of vLLM draws sampling noise or seeds for it."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


@contextmanager
def _default_group_kept() -> Iterator[None]:
    """Keep vLLM from destroying the trainer's process group, which DeepSpeed's groups belong to for the whole process.

    Without `close` it would do so later, whenever its engine is garbage collected.
    """
    destroy = dist.destroy_process_group
    dist.destroy_process_group = lambda group=None: None if group is None else destroy(group)
    try:
        yield
    finally:
        dist.destroy_process_group = destroy


@contextmanager
def _trainers_random_state() -> Iterator[None]:
    """Restore the trainer's random states on exit, so that a resumed run draws the same numbers."""
    python, arrays = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(arrays)
