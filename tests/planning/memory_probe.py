"""Measures the memory of training: a separate process builds the real engine and makes two real updates.

Freed tensors are returned to the system at once (see `ENVIRONMENT`), so resident memory is the memory of live tensors.
"""

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import psutil

# glibc: every block of 64 KiB or more is its own mapping, which `free` unmaps.
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_MMAP_MAX_": "1000000", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip
TESTS = Path(__file__).parent.parent
TIMEOUT_S = 150


@dataclass(frozen=True)
class Case:
    """responses: their lengths, the same on each rank. budget: train.micro_batch_tokens. model, train: more config keys."""

    path: str
    responses: list[int]
    budget: int
    ranks: int = 1
    reference: bool = False
    model: dict = field(default_factory=dict)
    train: dict = field(default_factory=dict)


def measure(case: Case) -> int:
    """Return the peak resident bytes, minus those before the model is loaded, of the rank with the most."""
    from mssr_process import free_port

    port, processes = str(free_port()), []
    for rank in range(case.ranks):
        layout = {} if case.ranks == 1 else {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.ranks), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }  # fmt: skip
        environment = os.environ | ENVIRONMENT | layout | {"PYTHONPATH": os.pathsep.join(map(str, _paths()))}
        arguments = [sys.executable, __file__, json.dumps(case.__dict__)]
        processes.append(subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    results = []
    for process in processes:
        try:
            out, error = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            for other in processes:
                other.kill()
            raise
        assert process.returncode == 0, error.decode()[-3000:]
        results.append(int(out.decode().split()[-1]))
    return max(results)


def _paths() -> list[Path]:
    return [TESTS / "planning", TESTS / "policy", TESTS, *map(Path, filter(None, sys.path))]


def chosen_prompts(count: int) -> list:
    from policy_helpers import prompts

    return [prompts()[index % len(prompts())] for index in range(count)]


@cache
def wide_model(folder: Path, *, hidden: int = 448, layers: int = 4, vocabulary: int = 4096) -> str:
    """Write a model like the tiny one with about 20 million parameters, so that tensors dominate memory; return its path."""
    import torch
    from policy_helpers import digit_rows, model_dir
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    from examples.tiny.model import write_tiny_model

    model_dir()
    corpus = [row["problem"] + row["solution"] for row in digit_rows()]
    write_tiny_model(folder, corpus, hidden=hidden, layers=layers, vocabulary=300)
    config = AutoConfig.from_pretrained(folder)
    config.text_config.vocab_size = vocabulary
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)


# The rest runs in the measured process.


def _train(case: Case) -> None:
    import mssr.environment  # noqa: F401  first, as in mssr.cli  # isort: skip
    import torch
    from policy_helpers import model_dir

    from mssr.distributed import start_world

    torch.set_num_threads(1)
    world = start_world("cpu")
    _updates(Case(**case.__dict__ | {"path": model_dir(), "responses": [20, 30, 10], "budget": 80}), world)  # warm-up
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _resident_bytes()
    with Sampler() as sampler:
        marks = _updates(case, world)
    if os.environ.get("MSSR_PROBE_MARKS"):
        print({name: round((value - before) / 2**20) for name, value in marks.items()}, file=sys.stderr)
    world.gather(None)
    print(sampler.peak - before)
    sys.stdout.flush()
    os._exit(0)


def _updates(case: Case, world) -> dict:
    import torch
    from policy_helpers import random_batch

    from mssr.config.schema import ModelConfig, OptimizerConfig, TrainConfig
    from mssr.policy.engine import PolicyEngine
    from mssr.policy.loading import load_frozen_policy
    from mssr.policy.loss import PolicyGradient
    from mssr_kernels import PolicyLossConfig

    batch = random_batch(chosen_prompts(len(case.responses)), case.responses)
    engine = PolicyEngine(
        ModelConfig(path=case.path, **{"dtype": "float32"} | case.model),
        OptimizerConfig(),
        TrainConfig(micro_batch_tokens=case.budget, **case.train),
        world,
        temperature=1.0,
        total_updates=10,
    )
    marks = {"built": _resident_bytes()}
    if case.reference:
        reference = load_frozen_policy(case.path, torch.float32, world.device)
        marks["reference"] = _resident_bytes()
        engine.score(batch, reference)
    for number in range(2):
        with Sampler() as sampler:
            engine.update(batch, PolicyGradient(PolicyLossConfig()))
        marks |= {f"update {number} peak": sampler.peak, f"update {number} after": _resident_bytes()}
    return marks


def _resident_bytes() -> int:
    """Return resident bytes, mapped files included: on a CPU, weights are a mapped file until they are written to."""
    return psutil.Process().memory_info().rss


class Sampler:
    """peak: the largest resident memory within the `with` block, sampled every 2 ms."""

    def __enter__(self) -> "Sampler":
        self.peak, self._done = _resident_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, _resident_bytes())

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()


if __name__ == "__main__":
    with contextlib.redirect_stderr(sys.stderr):
        _train(Case(**json.loads(sys.argv[1])))
