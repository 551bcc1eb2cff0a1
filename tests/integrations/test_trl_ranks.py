"""TRL's trainers with our head on two ranks, under DDP and ZeRO: compared with TRL's head, and with one rank."""

import math
from types import SimpleNamespace

import pytest
import torch
from trl import GRPOTrainer
from trl_rank import grpo_steps, mssr_run
from trl_runs import write_text_model
from two_ranks import Ranks

from mssr.integrations.trl import FusedGRPOTrainer

TIMEOUT = 300  # seconds per call; the first one imports TRL
pytestmark = pytest.mark.slow("18 s: two ranks that import TRL")
STAGES = pytest.mark.parametrize("stage", [0, 2, 3], ids=["ddp", "zero2", "zero3"])


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("trl"))


@pytest.fixture(scope="module")
def own_ranks():
    """Ranks for these tests alone, because accelerate and transformers keep state of a run in their modules."""
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="module")
def one_rank(text_model, tmp_path_factory):
    return mssr_run(SimpleNamespace(size=1), 0, text_model, tmp_path_factory.mktemp("one"))


def assert_same_steps(found, wanted, names):
    assert len(found) == len(wanted)
    for step, (ours, theirs) in enumerate(zip(found, wanted)):
        assert set(ours) == set(theirs)
        for name in names:
            assert math.isclose(ours[name], theirs[name], rel_tol=2e-4, abs_tol=2e-5), (step, name, ours, theirs)


@STAGES
def test_trls_objective(own_ranks, text_model, tmp_path, stage):
    stock, ours = (
        own_ranks(grpo_steps, kind, stage, text_model, tmp_path, timeout=TIMEOUT)
        for kind in (GRPOTrainer, FusedGRPOTrainer)
    )
    for rank in range(2):
        assert_same_steps(ours[rank], stock[rank], ("loss", "grad_norm", "entropy", "kl", "reward"))
    assert min(step["completions/clipped_ratio"] for step in stock[0]) < 1  # ranks have different numbers of tokens
    assert all(step["grad_norm"] > 0 for step in stock[0])


@STAGES
def test_mssr_is_that_of_one_rank_with_all_prompts(own_ranks, one_rank, text_model, tmp_path, stage):
    wanted, advantages, tracker = one_rank
    found = own_ranks(mssr_run, stage, text_model, tmp_path, timeout=TIMEOUT)
    names = ("loss", "grad_norm", "entropy", "kl", "shaping/mean", "clip_ratio/region_mean")
    for steps, _, _ in found:
        assert_same_steps(steps, wanted, names)
    for theirs, *ours in zip(advantages, *(own for _, own, _ in found)):
        assert torch.allclose(torch.cat(ours), theirs, atol=1e-6)
    for _, _, state in found:
        assert state["keys"] == tracker["keys"]
        assert torch.allclose(state["beta"], tracker["beta"], rtol=1e-4)
    first, second = (state for _, _, state in found)
    assert torch.equal(first["beta"], second["beta"])
