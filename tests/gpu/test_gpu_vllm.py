"""vLLM in the trainer's process and on its GPU: sleep mode and vLLM's own sampler, which only CUDA has."""

import sys
from pathlib import Path

import pytest
import torch

for library in ("vllm", "pydantic", "deepspeed", "transformers"):
    pytest.importorskip(library)

import mssr.environment  # noqa: E402, F401  before the libraries that read it

sys.path.insert(0, str(Path(__file__).parents[1] / "policy"))

from policy_helpers import model_dir, processors, prompts, random_batch, run_config  # noqa: E402

from mssr.config.schema import ModelConfig, OptimizerConfig, TrainConfig  # noqa: E402
from mssr.distributed import start_world  # noqa: E402
from mssr.policy.engine import PolicyEngine  # noqa: E402
from mssr.policy.loss import CrossEntropy  # noqa: E402
from mssr.rollout.base import noise_streams  # noqa: E402
from mssr.rollout.gap import measure_gap  # noqa: E402
from mssr.rollout.vllm.engine import VLLMRollout  # noqa: E402

MEAN_GAP = 0.05  # nats, bfloat16 on both sides


@pytest.fixture(scope="module")
def trainer():
    return PolicyEngine(
        ModelConfig(path=model_dir(), dtype="bfloat16"), OptimizerConfig(lr=1e-2, grad_clip=1.0),
        TrainConfig(micro_batch_tokens=512, zero_stage=2), start_world("cuda"), temperature=1.0, total_updates=10,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sampler(trainer):
    config = run_config(engine="vllm", max_response_tokens=12, gpu_memory=0.2)
    tokenizer, _ = processors()
    engine = VLLMRollout(config, trainer.policy, list(range(100, 130)), tokenizer.pad_token_id, trainer.world)
    yield engine
    engine.close()


def sample(sampler, step):
    chosen = list(prompts()) * 4
    return sampler.generate(chosen, noise_streams(0, "train", step, list(range(24))), 1.0)


def responses(batch):
    return [batch.response(row).tolist() for row in range(len(batch))]


def test_fresh_weights_after_every_sleep(trainer, sampler):
    for version in range(4):
        sampler.update_weights(trainer.policy, version)
        batch = sample(sampler, version)
        sampler.release()
        assert measure_gap(trainer.score(batch), batch.logp, batch.mask, trainer.world).mean < MEAN_GAP
        trainer.update(random_batch(list(prompts()), [5, 9, 3, 7, 1, 12], seed=version), CrossEntropy())


def test_the_noise_is_the_calls_own(trainer, sampler):
    """Equal calls give equal responses, other steps give others, whichever random generator this vLLM uses."""
    sampler.update_weights(trainer.policy, 0)
    first, other, again = (sample(sampler, step) for step in (1, 2, 1))
    assert responses(first) == responses(again)
    assert sum(mine == theirs for mine, theirs in zip(responses(first), responses(other))) <= 2


def test_the_memory_is_the_trainers_while_it_sleeps(trainer, sampler):
    sampler.update_weights(trainer.policy, 0)
    awake, total = torch.cuda.mem_get_info()
    sampler.release()
    asleep, _ = torch.cuda.mem_get_info()
    assert asleep - awake > 0.1 * total  # most of its share of 0.2
