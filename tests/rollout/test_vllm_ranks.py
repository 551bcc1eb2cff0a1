"""vLLM in the processes of two ranks: 20 training steps under ZeRO-2 and ZeRO-3, and one engine over both ranks."""

from pathlib import Path

import pytest
import torch
from policy_helpers import make_engine, model_dir
from rollout_engines import vllm
from two_ranks import Ranks

from mssr.batch import UpdateBatch
from mssr.config.algorithm_keys import AlgorithmConfig
from mssr.config.resolve import policy_loss
from mssr.policy.loss import PolicyGradient
from mssr.rollout.base import noise_streams
from mssr.rollout.gap import measure_gap

pytestmark = pytest.mark.slow(
    "10 to 20 s each: vLLM on two ranks; test_freshness has the sync, test_weights the shares"
)
STEPS = 20


def gaps_of_training(world, prompts, path, zero_stage, tensor_parallel=1, steps=STEPS):
    """Run steps as `mssr train` does: sync, generate, measure the gap, update. Return each step's largest gap, and how far
    the policy moved over all steps, in nats per token."""
    engine = make_engine(path=path, world=world, zero_stage=zero_stage, lr=3e-3, total_updates=steps)
    # A quarter of the model, so that weights come in several buckets, and a layer's q, k, v in different ones.
    sampler = vllm(path, world=world, tensor_parallel=tensor_parallel, sync_gib=1e-4)
    loss = policy_loss(AlgorithmConfig(kl_coef=0.0))
    mine = list(prompts)[world.rank :: world.size] * 2
    first, gaps = None, []
    for step in range(steps + 1):
        sampler.update_weights(engine.policy, step)
        streams = noise_streams(world.rank, "train", step, list(range(len(mine))))
        batch = sampler.generate(mine, streams, 1.0)
        first = first or batch
        gaps.append(measure_gap(engine.score(batch), batch.logp, batch.mask, world).max)
        sampler.release()
        generator = torch.Generator().manual_seed(step)
        advantage = torch.randn(len(mine), generator=generator)
        update = UpdateBatch(
            batch.prompts, batch.tokens, batch.mask, batch.mask, batch.logp, advantage, batch.logp, None
        )
        engine.update(update, PolicyGradient(loss))
    moved = (engine.score(first) - first.logp).abs()[first.mask].mean()
    return gaps, float(moved)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_no_gap_after_any_of_twenty_steps(ranks, prompts, zero_stage, tied):
    for gaps, moved in ranks(gaps_of_training, prompts, model_dir(tied), zero_stage, timeout=300):
        assert len(gaps) == STEPS + 1 and max(gaps) <= 1e-3
        assert moved > 0.05  # stale weights would give a gap of this size


@pytest.fixture
def no_leftovers():
    """Remove shared memory: vLLM's CPU build uses the same names in every run, and a killed run leaves its memory."""

    def clear():
        for segment in Path("/dev/shm").glob("*-cpushm_*"):
            segment.unlink()

    clear()
    yield
    clear()


def test_one_engine_over_both_ranks(ranks, prompts, no_leftovers):
    """Tensor parallel: both ranks hold part of the weights and answer each other's prompts. This needs new processes, because
    one process cannot have engines of different tensor-parallel sizes."""
    pair = Ranks(2)
    try:
        found = pair(gaps_of_training, prompts, model_dir(), 2, tensor_parallel=2, steps=4, timeout=300)
    finally:
        pair.stop()
    for gaps, moved in found:
        assert len(gaps) == 5 and max(gaps) <= 1e-3 and moved > 0.01
