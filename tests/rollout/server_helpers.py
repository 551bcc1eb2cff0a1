"""Real vLLM servers on this machine, each in a process group of its own, and the trainer's side of them."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import yaml
from mssr_process import free_port
from policy_helpers import ALONE, model_dir, processors

from mssr.config import RolloutConfig
from mssr.rollout.servers import ServerRollout

START_S = 300  # to import vLLM twice on busy cores
ENDS = list(range(100, 130))  # of 300 tokens: some responses end, others are cut
PROMPT_TOKENS, RESPONSE_TOKENS = 244, 12


class Server:
    """`mssr serve` in the background. stop, go_on, kill: by signals, to all of its processes, which it cannot catch."""

    def __init__(self, folder: Path, config: Path | None = None) -> None:
        """folder: for its log. config: by default of the helpers' tiny model."""
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log = folder / f"server_{port}.log"
        if config is None:
            config = folder / "serve.yaml"
            config.write_text(yaml.safe_dump(serve_settings(folder)))
        env = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        command = [sys.executable, "-m", "mssr", "serve", str(config), "--port", str(port)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)

    def wait(self) -> "Server":
        deadline = time.monotonic() + START_S
        while not self._healthy():
            assert self._process.poll() is None and time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.1)
        return self

    def ask(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read().decode()

    def stop(self) -> None:
        os.killpg(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _healthy(self) -> bool:
        try:
            self.ask("/health")
        except OSError:
            return False
        return True


def serve_settings(folder: Path) -> dict:
    return {
        "run_dir": str(folder / "run"),
        "model": {"path": model_dir()},
        "data": {"train": "unused", "max_prompt_tokens": PROMPT_TOKENS},
        "rollout": {"max_response_tokens": RESPONSE_TOKENS, "batch_size": 8, "prompts_per_step": 8},
        "train": {"responses_per_update": 8},
    }


def rollout(policy, servers: list, *, world=ALONE, ends=ENDS, **settings) -> ServerRollout:
    """The engine. servers: `Server`s or addresses. Small buffers: even the tiny model's weights take many."""
    defaults = {
        "engine": "servers", "servers": [getattr(server, "url", server) for server in servers], "batch_size": 4,
        "max_response_tokens": RESPONSE_TOKENS, "server_timeout_s": 60, "sync_gib": 1e-4,
    }  # fmt: skip
    tokenizer, _ = processors()
    ends = sorted({tokenizer.eos_token_id, *ends})
    return ServerRollout(RolloutConfig(**defaults | settings), policy, ends, tokenizer.pad_token_id, world)
