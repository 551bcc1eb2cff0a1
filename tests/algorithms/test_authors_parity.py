"""Tracker, advantages, shaping and loss equal values recorded from the MSSR authors' own functions, to 1e-6.

`authors_recorded.json` names its source. Our settings for it: preset `reference`, `entropy_source` sampled_token.

We deliberately differ in these cases. They are not in the recording, or the tests leave them out:

- The mean KL that determines rho: theirs also counts the padding, whose first position holds a token of the neighbouring
  row; ours counts response tokens only. (In the recording both log-probs are equal there, so the results agree.)
- A batch whose advantages are all equal: theirs can be one ulp divided by 1e-3; ours are exactly 0. They raise a nonzero
  variance below 1e-6 to 1e-6, which does not occur with rewards 0 and 1.
- A single response: they do not normalise its advantage; ours is 0.
- GRPO and RLOO groups with equal rewards: theirs are rounding noise over eps; ours are exactly 0.
- Bounds in the loss: they clamp log-ratios to [-20, 20] and k3 per token to 10, beyond which the gradient is 0; ours is
  the plain formula (no recorded token reaches the bounds). The KL that determines rho is clamped in both.
- Their H uses the log-probs that the trainer recomputed. In our runs sampled_token uses the sampler's if the loss gets
  both; in these tests it gets only the recomputed ones.
- Their loss is a mean over the tokens of a micro-batch, then over micro-batches; ours is one mean over all tokens of an
  update. The recording has one micro-batch, for which both are the same.
- Their per-prompt rho (off in their runs) sums differences between the log-probs of two different responses.
"""

import json
from pathlib import Path

import pytest
import torch
from shaping_oracle import shape

from mssr.algorithms.advantages import ALGORITHMS, Outcomes
from mssr.algorithms.value_tracker import ValueTracker, reference_kl
from mssr.batch import pad_rows
from mssr.config.algorithm_keys import AlgorithmConfig, TrackerConfig
from mssr.config.resolve import policy_loss
from mssr.observe.step import sampled_token_entropy
from mssr_kernels import reference

RECORDED = json.loads((Path(__file__).parent / "authors_recorded.json").read_text())
THEIRS = AlgorithmConfig(tracker=TrackerConfig(preset="reference"), entropy_source="sampled_token", tis_cap=None)


def close(ours, theirs):
    ours = torch.as_tensor(ours, dtype=torch.float64)
    torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def padded(rows: list[list[float]]) -> torch.Tensor:
    """Return [B, R] float32, padded with NaN, which must not affect any result."""
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
        graded = torch.ones(len(reward), dtype=torch.bool)
        advantage = ALGORITHMS[name].advantages(Outcomes(reward, reward, graded, baseline, lengths, group=1))
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
    """Return our loss of these recorded tokens, float64, and the logits [len(rows), 1] that it depends on."""
    names = ("logp", "old_logp", "ref_logp", "advantage")
    logp, old, ref, advantage = (torch.tensor(recorded[name], dtype=torch.float64)[rows] for name in names)
    # A vocabulary of two tokens: the recorded one, and another whose logit is 0.
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
    graded = torch.ones(len(reward), dtype=torch.bool)
    outcomes = Outcomes(reward, reward, graded, None, lengths, recorded["group"])
    close(ALGORITHMS[name].advantages(outcomes), recorded[name])
