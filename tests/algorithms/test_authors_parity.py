"""What the authors of MSSR compute, recorded from their own functions, against ours: to 1e-6, absolute plus relative.

`authors_recorded.json` says where it is from. Theirs: preset `reference`, `entropy_source` sampled_token.

What is deliberately not reproduced, and so is not in the recording, or is left out by the tests:

- The mean KL that moves rho counts whatever lies under the padding; at its first position that is a token of the
  neighbouring row. Ours counts a response's own tokens. (Recorded with equal log-probs there, where both agree.)
- A batch whose advantages are all equal: their mean can be an ulp off, which they divide by 1e-3; ours are exactly 0.
  A variance below 1e-6 that is not 0 they raise to 1e-6; with rewards 0 and 1 there is none.
- A single response is not normalised by theirs; ours is worth 0.
- GRPO and RLOO of a group with equal rewards: rounding noise over eps; ours are exactly 0.
- In the loss theirs bounds log-ratios to [-20, 20] and a token's k3 at 10, beyond which its gradient is 0 too; ours is
  the formula (no recorded token gets there). The KL that moves rho has the bounds.
- Their H is of the log-probs that the trainer recomputed. In a run, ours with sampled_token is of the sampler's, where
  the loss is given both; here it is given the recomputed ones alone.
- The loss is their mean over a micro-batch's tokens, then over micro-batches; ours is one mean over all of an update's
  tokens. For one micro-batch both are the same, which is what is recorded.
- Their per-prompt rho (off in their runs): a sum over tokens of differences of log-probs of two different responses.
"""

import json
from pathlib import Path

import pytest
import torch
from shaping_oracle import shape

from mssr.algorithms.advantages import ALGORITHMS, Outcomes
from mssr.algorithms.value_tracker import ValueTracker, reference_kl
from mssr.batch import pad_rows
from mssr.config import AlgorithmConfig, TrackerConfig
from mssr.config.resolve import policy_loss
from mssr.observe.step import sampled_token_entropy
from mssr_kernels import reference

RECORDED = json.loads((Path(__file__).parent / "authors_recorded.json").read_text())
THEIRS = AlgorithmConfig(tracker=TrackerConfig(preset="reference"), entropy_source="sampled_token", tis_cap=None)


def close(ours, theirs):
    ours = torch.as_tensor(ours, dtype=torch.float64)
    torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def padded(rows: list[list[float]]) -> torch.Tensor:
    """[B, R], with NaN under the padding, which must not matter."""
    return pad_rows([torch.tensor(row) for row in rows], max(map(len, rows)), float("nan"))


def test_tracker_advantages_and_shaping_of_a_run():
    tracker = ValueTracker(THEIRS.tracker)
    close(tracker.rho(), RECORDED["rho_without_kl"])
    outcomes = RECORDED["initial"]["outcomes"]
    keys = [str(prompt) for prompt, rewards in enumerate(outcomes) for _ in rewards]
    tracker.initialise(keys, torch.tensor(sum(outcomes, [])))
    close(tracker.values([str(prompt) for prompt in range(20)]), RECORDED["initial"]["values"])

    regimes = set()
    for step in RECORDED["steps"]:
        keys, reward = [str(prompt) for prompt in step["prompts"]], torch.tensor(step["reward"])
        old, ref = padded(step["old_logp"]), padded(step["ref_logp"])
        lengths = torch.tensor([len(row) for row in step["old_logp"]])
        mask = torch.arange(old.shape[1]) < lengths[:, None]

        baseline = tracker.values(keys)
        close(baseline, step["baseline"])
        name = "mssr" if step["shaped"] else "mvsr"
        loss = policy_loss(THEIRS.model_copy(update={"name": name}))
        advantage = ALGORITHMS[name].advantages(Outcomes(reward, baseline, lengths, group=1))
        shaped = shape(advantage[:, None], sampled_token_entropy(old), loss.entropy_alpha, loss.entropy_kappa)
        if (reward - baseline).unique().numel() == 1:
            assert not shaped[mask].any()
        else:
            close(shaped[mask], [value for row in step["advantage"] for value in row])

        kl = reference_kl(old, ref, mask).mean().item()
        close(kl, step["kl"])
        tracker.observe_kl(kl)
        rho = tracker.rho()
        close(rho, step["rho"])
        tracker.update(keys, reward, rho)
        if step["beta"]:
            state = tracker.state_dict()
            assert set(state["keys"]) == set(step["beta"])
            close(state["beta"], [step["beta"][key] for key in state["keys"]])
        regimes.add("floor" if step["rho"] == 0.875 else "rising")
    assert regimes == {"floor", "rising"}


@pytest.mark.parametrize("strengths", RECORDED["shaping"]["psi"])
def test_shaping_of_small_and_large_advantages(strengths):
    recorded = RECORDED["shaping"]
    alpha, kappa = map(float, strengths.split("/"))
    advantage = torch.tensor(recorded["advantage"])[:, None]
    entropy = sampled_token_entropy(torch.tensor(recorded["logp"]))
    close(entropy, recorded["entropy"])
    close(shape(advantage, entropy, alpha, kappa) - advantage, recorded["psi"][strengths])


def loss_of(recorded, rows, kl_coef):
    """Our loss of some of the recorded tokens, in float64, and the logits [len(rows), 1] it depends on."""
    names = ("logp", "old_logp", "ref_logp", "advantage")
    logp, old, ref, advantage = (torch.tensor(recorded[name], dtype=torch.float64)[rows] for name in names)
    # Of a token against one other, whose logit is 0.
    logit = (logp - torch.log1p(-logp.exp()))[:, None].requires_grad_()
    config = THEIRS.model_copy(update={"name": "mvsr", "old_logp": "recompute", "kl_coef": kl_coef})
    loss = reference.linear_policy_loss(
        logit,
        torch.tensor([[1.0], [0.0]], dtype=torch.float64),
        torch.zeros(len(logp), dtype=torch.long),
        advantage,
        old,
        ref_logp=ref,
        config=policy_loss(config),
    )
    return loss, logit


def test_policy_loss_token_by_token():
    recorded = RECORDED["policy"]
    for row, (theirs, k3) in enumerate(zip(recorded["token_loss"], recorded["k3"])):
        loss, _ = loss_of(recorded, [row], kl_coef=0.0)
        close(loss.loss.detach(), theirs)
        close(loss.metrics.kl_sum, k3)


def test_policy_loss_of_a_batch_and_its_gradient():
    recorded = RECORDED["policy"]
    count = len(recorded["logp"])
    loss, logit = loss_of(recorded, list(range(count)), recorded["kl_coef"])
    close(loss.loss.detach(), recorded["loss"])
    close(loss.metrics.clipped_sum / count, recorded["clipped_higher"])
    close(loss.metrics.dual_clipped_sum / count, recorded["clipped_lower"])
    loss.loss.backward()
    p = torch.tensor(recorded["logp"], dtype=torch.float64).exp()
    close(count * logit.grad[:, 0] / (1 - p), [count * slope for slope in recorded["gradient"]])


@pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce_pp"])
def test_advantages_without_a_tracker(name):
    recorded = RECORDED["groups"]
    reward, lengths = torch.tensor(recorded["reward"]), torch.tensor(recorded["lengths"], dtype=torch.int64)
    outcomes = Outcomes(reward, None, lengths, recorded["group"])
    close(ALGORITHMS[name].advantages(outcomes), recorded[name])
