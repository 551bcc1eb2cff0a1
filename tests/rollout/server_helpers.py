"""Real vLLM servers on this machine, each in its own process group, and the trainer's side."""

import os
import signal
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path

import torch
import yaml
from mssr_process import ends_within, free_port
from policy_helpers import ALONE, model_dir, plain_logp, plain_model, processors

from mssr.config.schema import RolloutConfig
from mssr.rollout.hf import HFRollout
from mssr.rollout.servers.rollout import ServerRollout
from mssr.rollout.stop import StopTexts

ENDS = list(range(100, 130))  # 30 of 300 tokens, so that some responses end and others are truncated
PROMPT_TOKENS, RESPONSE_TOKENS = 244, 12

# With this, vLLM finds the weight transfer for machines without a GPU, here and in child processes.
PLUGIN = str(Path(__file__).parent / "gloo_plugin")
sys.path.append(PLUGIN)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), PLUGIN]))


class Server:
    """`mssr serve` in the background. stop, go_on, kill: send all its processes SIGSTOP, SIGCONT, SIGKILL."""

    def __init__(self, folder: Path, config: Path | None = None) -> None:
        """folder: for its log. config: defaults to one with the helpers' tiny model."""
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

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        self.kill()

    def wait(self) -> "Server":
        while not self._healthy():
            assert not ends_within(self._process.pid, 0.1), self._log.read_text()
        return self

    @property
    def log(self) -> str:
        return self._log.read_text()

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


def rollout(policy, servers: list, *, world=ALONE, ends=ENDS, stop=(), **settings) -> ServerRollout:
    """Return the engine. servers: `Server`s or addresses. Buffers are so small that even the tiny model fills many."""
    defaults = {
        "engine": "servers", "servers": [getattr(server, "url", server) for server in servers], "batch_size": 4,
        "max_response_tokens": RESPONSE_TOKENS, "server_timeout_s": 60, "sync_gib": 1e-4,
    }  # fmt: skip
    tokenizer, _ = processors()
    ends = sorted({tokenizer.eos_token_id, *ends})
    config, stop = RolloutConfig(**defaults | settings), StopTexts(stop, tokenizer)
    return ServerRollout(config, policy, ends, tokenizer.pad_token_id, world, stop)


def change_weights(policy, seed: int) -> None:
    """Scale every weight by up to 1.2 and add noise: language model and vision tower, matrices, norms and biases."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
        parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))


def greedy_oracle(policy, prompts):
    """Return the greedy responses of the hf engine."""
    tokenizer, _ = processors()
    ends = sorted({tokenizer.eos_token_id, *ENDS})
    config = RolloutConfig(max_response_tokens=RESPONSE_TOKENS)
    engine = HFRollout(config, policy, ends, tokenizer.pad_token_id, ALONE.device)
    engine.update_weights(policy, 0)
    return engine.generate(prompts, [0] * len(prompts), 0.0)


def greedy(engine, prompts, **settings):
    return engine.generate(prompts, [0] * len(prompts), 0.0, **settings)


def assert_same_responses(found, expected):
    assert len(found) == len(expected)
    assert [found.response(row).tolist() for row in range(len(found))] == [
        expected.response(row).tolist() for row in range(len(expected))
    ]
    assert torch.equal(found.truncated, expected.truncated)
    torch.testing.assert_close(found.logp, expected.logp, atol=1e-4, rtol=0)


def assert_samples_from(batch, policy, temperature=1.0):
    """Check that the log-probs are those of plain transformers with the policy's weights."""
    plain = plain_model(model_dir())
    plain.load_state_dict(policy.model.state_dict())
    with torch.no_grad():
        expected = plain_logp(plain, batch, temperature)
    torch.testing.assert_close(batch.logp.double(), expected, atol=1e-4, rtol=0)
