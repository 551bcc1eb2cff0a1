"""Advantages: from the rewards of a step to one number per response. `ALGORITHMS` is the table of algorithms.

Pure functions of `Outcomes`, computed in float64: there the mean of equal float32 rewards is exact, so equal rewards get
advantages of exactly 0. In float32 the mean can be off by one ulp, which normalisation would turn into advantages of +-1.
torch is not imported, because the configuration reads the table too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Outcomes of all B responses of a step, over all ranks. Responses to the same prompt are adjacent.

    reward: [B] float32.
    baseline: [B] float32, the tracker's values before it saw these rewards; None without a tracker.
    lengths: [B] int64, tokens per response that count in the loss; 0 for a masked response.
    group: responses per prompt; divides B.
    """

    reward: Tensor
    baseline: Tensor | None
    lengths: Tensor
    group: int


def single_rollout(outcomes: Outcomes) -> Tensor:
    """Return r - v normalised over the batch, v from the value tracker: MSSR, MVSR (arXiv 2512.18215), SPO (2509.13232).

    MVSR is MSSR without entropy shaping, the only difference in the authors' scripts. SPO samples prompts by uncertainty
    (`prompt_sampling`). Differences from SPO's verl recipe: sampling weights cover the whole data set instead of a larger
    batch of the epoch; the std is the biased one (a factor of sqrt(1 - 1/B)); a prompt's value starts from
    `algorithm.tracker.n_init` rollouts; dual clip and KL term are on by default.
    """
    return batch_normalise(outcomes.reward - outcomes.baseline)


def grpo(outcomes: Outcomes) -> Tensor:
    """Return (r - mean) / (std + 1e-6) within each prompt's responses: GRPO (arXiv 2402.03300, section 4.1.2).

    The paper does not define the std and has no eps. Both are as in EasyR1, which the GRPO runs of arXiv 2512.18215 used:
    unbiased std (divided by group - 1), eps = 1e-6. With rewards 0 and 1 the smallest std is 1 / sqrt(group), so eps only
    matters where all rewards are equal, and there A is exactly 0. The loss averages over all tokens of an update; the
    paper's averages over the tokens of each response, then over responses.
    """
    reward = grouped(outcomes.reward.double(), outcomes.group)
    centred = reward - reward.mean(1, keepdim=True)
    return (centred / (reward.std(1, keepdim=True) + 1e-6)).flatten().to(outcomes.reward.dtype)


def rloo(outcomes: Outcomes) -> Tensor:
    """Return r minus the mean of the prompt's other responses: RLOO (arXiv 2402.14740). Not normalised.

    The paper takes one gradient step on the probability of a whole response. Here, as in EasyR1, A enters the clipped
    per-token loss.
    """
    reward = grouped(outcomes.reward.double(), outcomes.group)
    others = (reward.sum(1, keepdim=True) - reward) / (outcomes.group - 1)
    return (reward - others).flatten().to(outcomes.reward.dtype)


def reinforce_pp(outcomes: Outcomes) -> Tensor:
    """Return rewards whitened over all tokens of the batch: REINFORCE++ (arXiv 2501.03262). No group, no baseline.

    In the paper the return of a token is the reward minus the KL of the tokens that follow. As in EasyR1 the KL is in the
    loss instead, without discount, so every token's return is its response's reward, and mean and variance weight each
    response by its length. As `masked_whiten` in EasyR1 and verl: (r - mean) / sqrt(variance + 1e-8), the variance divided
    by the number of tokens minus 1. NaN anywhere gives all NaN.
    """
    weight, reward = outcomes.lengths.double(), outcomes.reward.double()
    tokens = weight.sum()
    centred = reward - (weight * reward).sum() / tokens.clamp(min=1)
    variance = (weight * centred.square()).sum() / (tokens - 1).clamp(min=1)
    return (centred / (variance + 1e-8).sqrt()).to(outcomes.reward.dtype)


@dataclass(frozen=True)
class Algorithm:
    """One value of `algorithm.name`.

    advantages: Outcomes -> [B] float32, in the order of the outcomes.
    tracked: needs the value tracker's baseline. grouped: compares several responses to the same prompt.
    shaped: the loss shapes advantages by token entropy. prioritised: samples prompts by uncertainty by default.
    """

    advantages: Callable[[Outcomes], Tensor]
    tracked: bool = False
    grouped: bool = False
    shaped: bool = False
    prioritised: bool = False


ALGORITHMS: dict[str, Algorithm] = {
    "mssr": Algorithm(single_rollout, tracked=True, shaped=True),
    "mvsr": Algorithm(single_rollout, tracked=True),
    "spo": Algorithm(single_rollout, tracked=True, prioritised=True),
    "grpo": Algorithm(grpo, grouped=True),
    "rloo": Algorithm(rloo, grouped=True),
    "reinforce_pp": Algorithm(reinforce_pp),
}


def batch_normalise(advantage: Tensor) -> Tensor:
    """Return (A - mean) / std with biased variance (arXiv 2512.18215); zeros if all are equal. NaN anywhere gives all NaN.

    advantage: [B], the sequences of all ranks; the result has its dtype.
    """
    shifted = (advantage - advantage[:1]).double()  # makes the std of equal advantages exactly 0
    centred = shifted - shifted.mean()
    std = centred.square().mean().sqrt()
    return (centred / std).masked_fill(std == 0, 0.0).to(advantage.dtype)


def grouped(values: Tensor, group: int) -> Tensor:
    """Reshape [B] to [B / group, group], one row per prompt.

    Raises:
        ValueError: groups of one, or a batch that is not a whole number of groups.
    """
    if group < 2 or len(values) % group:
        raise ValueError(f"{len(values)} responses in groups of {group}: need whole groups of at least 2")
    return values.view(-1, group)


def zero_variance(reward: Tensor, group: int) -> Tensor:
    """Return [B] bool, True for every response of a group whose rewards are all equal; a NaN equals nothing.

    Such a group has no gradient under GRPO and RLOO; DAPO's dynamic sampling (arXiv 2503.14476, section 3.2) replaces it.

    reward: [B], responses to the same prompt adjacent.
    group: responses per prompt, at least 2.
    """
    rewards = grouped(reward, group)
    return (rewards == rewards[:, :1]).all(1).repeat_interleave(group)
