"""Rollouts by vLLM servers on other GPUs or hosts, over HTTP; `mssr serve` starts one."""

import asyncio
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mssr.batch import Prompt
from mssr.config.schema import RolloutConfig
from mssr.distributed import World
from mssr.errors import UserError
from mssr.policy.model import Policy
from mssr.rollout.base import OnResponse, Request, Response, RolloutEngine, Sampling
from mssr.rollout.servers.client import ServerLost, call, call_all, http_session
from mssr.rollout.servers.weights import WeightTransfer
from mssr.rollout.stop import StopTexts
from mssr.rollout.vllm.adapter import require_server_vllm
from mssr.rollout.vllm.requests import engine_input, sampling_params

_HEALTH_S = 10.0  # a server that does not answer a health check within this time gets no requests
_POLL_S = 0.25  # between health checks of a server that is still starting


class ServerRollout(RolloutEngine):
    """Here `generate` may run in another thread than the rest, and is no collective. `release` does nothing: servers keep
    their memory.

    Greedy responses are reproducible, up to rounding that depends on what else a server computes at the time. Sampled
    ones are not: servers draw noise from their own generators, and the order in which requests arrive varies. `streams`
    are not used: vLLM's seeds per request slow down its sampler on a GPU and do not exist on a CPU.

    A server is lost when it refuses or resets a connection, answers 5xx, sends nothing for rollout.server_timeout_s
    while it owes responses, or has other weights than were sent (restarted). Its requests go to the others. The next
    `update_weights` includes it again if it is back.
    """

    name = "servers"

    def __init__(
        self,
        config: RolloutConfig,
        policy: Policy,
        ends: list[int],
        pad: int,
        world: World,
        stop: StopTexts | None = None,
    ) -> None:
        """Connect to nothing yet.

        Raises:
            UserError: no usable vLLM is installed here, whose weight transfer is needed.
        """
        super().__init__(config, ends, pad, stop)
        require_server_vllm(world.device.type)
        self._world = world
        self._image_token_id, self._merge_size = policy.image_token_id, policy.merge_size
        self._forbidden = policy.forbidden_token_ids
        self._servers = [server.rstrip("/") for server in config.servers]
        self._live: list[str] = []
        self._lost: dict[str, str] = {}  # address to reason, since the last update
        self._reported: set[str] = set()
        self._transfer = WeightTransfer(world, int(config.sync_gib * 2**30), config.server_timeout_s)

    def update_weights(self, policy: Policy, version: int) -> None:
        """See `RolloutEngine`.

        Raises:
            UserError: a server is missing at the start of the run, all are missing later, or one died during the transfer.
        """
        for lost in self._world.gather(self._lost):
            for server, reason in lost.items():
                self._report(server, reason)
        with self._world.together():
            called = self._roll_call() if self._world.is_main else {}
        workers = self._world.gather(called)[0]
        self._transfer.send(policy, version, workers)
        self._live, self._lost, self._weight_version = list(workers), {}, version
        self._reported -= workers.keys()

    def _sample(self, requests: list[Request], sampling: Sampling, finished: OnResponse) -> None:
        """Raises:
        UserError: no server is left, or one refuses a request.
        """
        limit = self._config.max_response_tokens
        settings = sampling_params(sampling, limit, self._ends, self._forbidden, self._stop.texts)
        prompts = {request.row: request.prompt for request in requests}
        work = _Work(
            make_body=lambda row: self._body(prompts[row], settings),
            read=self._read,
            on_response=finished,
            on_lost=self._lose,
            servers=list(self._live),
            at_once=self._config.batch_size,
            silence_s=self._config.server_timeout_s,
        )
        asyncio.run(work.run(list(prompts)))

    def close(self) -> None:
        self._transfer.close()

    def _body(self, prompt: Prompt, settings: dict) -> dict[str, Any]:
        """Return the request as vLLM's own front end would write it."""
        inputs = engine_input(prompt, self._image_token_id, self._merge_size)
        body = {"token_ids": inputs["prompt_token_ids"], "sampling_params": settings, "stream": False}
        if "mm_kwargs" in inputs:
            from vllm.entrypoints.scale_out.token_in_token_out.mm_serde import encode_mm_kwargs_item

            body["features"] = {
                "mm_hashes": inputs["mm_hashes"],
                "mm_placeholders": {
                    "image": [
                        {"offset": place.offset, "length": place.length} for place in inputs["mm_placeholders"]["image"]
                    ]
                },
                "kwargs_data": {"image": [encode_mm_kwargs_item(item) for item in inputs["mm_kwargs"]["image"]]},
            }
        return body

    def _read(self, server: str, answer: dict[str, Any]) -> Response:
        (choice,) = answer["choices"]
        if choice["finish_reason"] not in ("stop", "length"):
            raise ServerLost(server, f"it ended a response by itself ({choice['finish_reason']})")
        versions = {span["version"] for span in choice.get("weight_versions") or ()}  # absent before vLLM 0.32
        if versions - {str(self._weight_version)}:
            raise ServerLost(server, f"it has weights {', '.join(versions)}, not {self._weight_version}: restarted?")
        if choice["finish_reason"] == "length" and len(choice["token_ids"]) < self._config.max_response_tokens:
            raise UserError(
                f"rollout.servers {server} cuts responses at {len(choice['token_ids'])} tokens, before "
                f"rollout.max_response_tokens {self._config.max_response_tokens}; start it with this config"
            )
        logps = [token["logprob"] for token in choice["logprobs"]["content"]]
        return self._response(choice["token_ids"], logps)

    def _lose(self, server: str, reason: str) -> None:
        self._live.remove(server)
        self._lost[server] = reason
        self._report(server, reason)

    def _report(self, server: str, reason: str) -> None:
        """Report a lost server once, on rank 0; losses that other ranks see are reported at the next update."""
        if self._world.is_main and server not in self._reported:
            self._reported.add(server)
            print(f"mssr: rollout server {server} is out: {reason}", file=sys.stderr, flush=True)

    def _roll_call(self) -> dict[str, int]:
        """Return the servers that answer, with the number of workers of each.

        Raises:
            UserError: one is missing at the start of the run, or all later; or one is no vLLM server.
        """
        first = self._weight_version is None
        deadline = time.monotonic() + self._config.server_timeout_s
        workers: dict[str, int] = {}
        awaited: set[str] = set()
        while True:
            asked = [server for server in self._servers if server not in workers]
            answers = _ask(asked, "/health", self._config.server_timeout_s)
            lost = {server: answer for server, answer in answers.items() if isinstance(answer, ServerLost)}
            there = _ask([server for server in asked if server not in lost], "/get_world_size", _HEALTH_S)
            for server, answer in there.items():
                if isinstance(answer, ServerLost):
                    lost[server] = answer
                elif not isinstance(answer, dict) or not isinstance(answer.get("world_size"), int):
                    raise UserError(f"rollout.servers {server} is not a vLLM server; start one with `mssr serve`")
                else:
                    workers[server] = answer["world_size"]
            if not first or not lost or time.monotonic() > deadline:
                break
            if awaited != lost.keys():
                awaited = set(lost)
                print(f"mssr: {_waiting(lost, self._config.server_timeout_s)}", flush=True)
            time.sleep(_POLL_S)
        if awaited and not lost:
            print("mssr: all rollout.servers are there", flush=True)
        if lost and (first or not workers):
            raise UserError(_nobody(lost, self._config.server_timeout_s if first else None))
        for server, answer in lost.items():
            self._report(server, answer.reason)
        return {server: workers[server] for server in self._servers if server in workers}


@dataclass
class _Work:
    """Sends the requests of one `generate` to the servers, all in one thread.

    make_body: a row's request. read: turns an answer into a response. on_lost: called with a lost server and the reason.
    at_once: concurrent requests per server. silence_s: how long a server that owes responses may send nothing.
    """

    make_body: Callable[[int], dict]
    read: Callable[[str, dict], Response]
    on_response: OnResponse
    on_lost: Callable[[str, str], None]
    servers: list[str]
    at_once: int
    silence_s: float
    lost: dict[str, ServerLost] = field(default_factory=dict)

    async def run(self, order: list[int]) -> None:
        """Get the response of each row. order: the rows in the order in which to start them."""
        self._waiting = deque(order)
        self._under_way: dict[asyncio.Task, tuple[str, int]] = {}
        self._heard: dict[str, float] = dict.fromkeys(self.servers, time.monotonic())
        async with http_session() as session:
            try:
                while self._waiting or self._under_way:
                    self._hand_out(session)
                    deadline = min(self._heard[server] for server, _ in self._under_way.values()) + self.silence_s
                    wait = max(0.0, deadline - time.monotonic())
                    done, _ = await asyncio.wait(self._under_way, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
                    for row, response in self._take(done):
                        self.on_response(row, response)
                    self._lose_silent()
            finally:
                for task in self._under_way:
                    task.cancel()
                await asyncio.gather(*self._under_way, return_exceptions=True)

    def _hand_out(self, session) -> None:
        """Send waiting rows to the servers with the fewest requests."""
        if not self.servers:
            raise UserError(_nobody(self.lost))
        load = dict.fromkeys(self.servers, 0)
        for server, _ in self._under_way.values():
            load[server] += 1
        while self._waiting:
            server = min(self.servers, key=load.get)
            if load[server] >= self.at_once:
                return
            if load[server] == 0:
                self._heard[server] = time.monotonic()  # it owed nothing
            load[server] += 1
            row = self._waiting.popleft()
            task = asyncio.create_task(call(session, server, "/inference/v1/generate", self.make_body(row)))
            self._under_way[task] = server, row

    def _take(self, done: set[asyncio.Task]) -> list[tuple[int, Response]]:
        """Return the rows that are done; rows of a lost server wait again."""
        found, failures = [], []
        for task in done:
            server, row = self._under_way[task]
            try:
                response = self.read(server, task.result())
            except ServerLost as failure:
                failures.append(failure)
                continue
            del self._under_way[task]
            self._heard[server] = time.monotonic()
            found.append((row, response))
        for failure in failures:
            self._lose(failure)
        return found

    def _lose_silent(self) -> None:
        for server in list({server for server, _ in self._under_way.values()}):
            if time.monotonic() - self._heard[server] >= self.silence_s:
                self._lose(ServerLost(server, f"nothing came from it for {self.silence_s:g} s"))

    def _lose(self, failure: ServerLost) -> None:
        if failure.server not in self.servers:
            return
        self.servers.remove(failure.server)
        self.lost[failure.server] = failure
        for task, (server, row) in list(self._under_way.items()):
            if server == failure.server:
                task.cancel()
                del self._under_way[task]
                self._waiting.appendleft(row)
        self.on_lost(failure.server, failure.reason)


def _ask(servers: list[str], path: str, timeout_s: float) -> dict[str, Any]:
    return call_all(dict.fromkeys(servers), path, method="GET", timeout_s=min(timeout_s, _HEALTH_S)) if servers else {}


def _waiting(lost: dict[str, ServerLost], at_most_s: float) -> str:
    missing = "; ".join(map(str, lost.values()))
    limit = f"{at_most_s:g} s (rollout.server_timeout_s)"
    return f"waiting up to {limit} for rollout.servers {missing}; start them with `mssr serve`"


def _nobody(lost: dict[str, ServerLost], waited_s: float | None = None) -> str:
    waited = f" after {waited_s:g} s (rollout.server_timeout_s)" if waited_s is not None else ""
    missing = "; ".join(map(str, lost.values()))
    return f"rollout.servers: not there{waited}: {missing}; start them with `mssr serve`"
