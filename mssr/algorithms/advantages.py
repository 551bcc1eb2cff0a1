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

    reward: [B] float32, the weighted sum of the reward's parts.
    success: [B] float32 in [0, 1], the part that the tracker learns.
    graded: [B] bool, False for a response without a grade: whatever its reward and success are, its advantage is 0, and
        those of the others are what they would be without it.
    value: [B] float32, the success that the tracker expected before it saw this one; None without a tracker.
    lengths: [B] int64, tokens per response that count in the loss; 0 for a masked response.
    group: responses per prompt; divides B.
    success_weight: factor of the success in the reward.
    """

    reward: Tensor
    success: Tensor
    graded: Tensor
    value: Tensor | None
    lengths: Tensor
    group: int
    success_weight: float = 1.0

    @property
    def baseline(self) -> Tensor | None:
        """[B] float32, the part of the reward that the tracker expected; the reward's other parts have no baseline."""
        return None if self.value is None else self.success_weight * self.value


def single_rollout(outcomes: Outcomes) -> Tensor:
    """Return r - v normalised over the batch, v from the value tracker: MSSR, MVSR (arXiv 2512.18215), SPO (2509.13232).

    MVSR is MSSR without entropy shaping, the only difference in the authors' scripts. SPO samples prompts by uncertainty
    (`prompt_sampling`). Differences from SPO's verl recipe: sampling weights cover the whole data set instead of a larger
    batch of the epoch; the std is the biased one (a factor of sqrt(1 - 1/B)); a prompt's value starts from
    `algorithm.tracker.n_init` rollouts; dual clip and KL term are on by default.
    """
    graded = outcomes.graded
    advantage = batch_normalise((outcomes.reward - outcomes.baseline)[graded])
    return outcomes.reward.new_zeros(len(graded)).masked_scatter(graded, advantage)


def grpo(outcomes: Outcomes) -> Tensor:
    """Return (r - mean) / (std + 1e-6) within each prompt's responses: GRPO (arXiv 2402.03300, section 4.1.2).

    The paper does not define the std and has no eps. Both are as in EasyR1, which the GRPO runs of arXiv 2512.18215 used:
    unbiased std (divided by group - 1), eps = 1e-6. With rewards 0 and 1 the smallest std is 1 / sqrt(group), so eps only
    matters where all rewards are equal, and there A is exactly 0. The loss averages over all tokens of an update; the
    paper's averages over the tokens of each response, then over responses.
    """
    reward, graded = _graded_groups(outcomes)
    count = graded.sum(1, keepdim=True)
    centred = (reward - reward.sum(1, keepdim=True) / count.clamp(min=1)).masked_fill(~graded, 0.0)
    std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return (centred / (std + 1e-6)).flatten().to(outcomes.reward.dtype)


def rloo(outcomes: Outcomes) -> Tensor:
    """Return r minus the mean of the prompt's other responses: RLOO (arXiv 2402.14740). Not normalised.

    The paper takes one gradient step on the probability of a whole response. Here, as in EasyR1, A enters the clipped
    per-token loss.
    """
    reward, graded = _graded_groups(outcomes)
    count = graded.sum(1, keepdim=True)
    others = (reward.sum(1, keepdim=True) - reward) / (count - 1).clamp(min=1)
    compared = graded & (count > 1)  # with one response in the group
    return (reward - others).masked_fill(~compared, 0.0).flatten().to(outcomes.reward.dtype)


def reinforce_pp(outcomes: Outcomes) -> Tensor:
    """Return rewards whitened over all tokens of the batch: REINFORCE++ (arXiv 2501.03262). No group, no baseline.

    In the paper the return of a token is the reward minus the KL of the tokens that follow. As in EasyR1 the KL is in the
    loss instead, without discount, so every token's return is its response's reward, and mean and variance weight each
    response by its length. As `masked_whiten` in EasyR1 and verl: (r - mean) / sqrt(variance + 1e-8), the variance divided
    by the number of tokens minus 1. NaN anywhere gives all NaN.
    """
    weight = outcomes.lengths.double().masked_fill(~outcomes.graded, 0.0)
    reward = outcomes.reward.double().masked_fill(~outcomes.graded, 0.0)
    tokens = weight.sum()
    centred = reward - (weight * reward).sum() / tokens.clamp(min=1)
    variance = (weight * centred.square()).sum() / (tokens - 1).clamp(min=1)
    return (centred / (variance + 1e-8).sqrt()).masked_fill(~outcomes.graded, 0.0).to(outcomes.reward.dtype)


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


def _graded_groups(outcomes: Outcomes) -> tuple[Tensor, Tensor]:
    """Return rewards (float64, 0 without a grade) and graded, both [B / group, group]."""
    reward = outcomes.reward.double().masked_fill(~outcomes.graded, 0.0)
    return grouped(reward, outcomes.group), grouped(outcomes.graded, outcomes.group)


def zero_variance(reward: Tensor, graded: Tensor, group: int) -> Tensor:
    """Return [B] bool, True for every response of a group whose graded responses have equal rewards; a NaN equals nothing.

    Such a group has no gradient under GRPO and RLOO, nor has one with a single grade or none; DAPO's dynamic sampling (arXiv
    2503.14476, section 3.2) replaces it.

    reward, graded: [B], responses to the same prompt adjacent.
    group: responses per prompt, at least 2.
    """
    rewards, graded = grouped(reward, group), grouped(graded, group)
    first = rewards.gather(1, graded.int().argmax(1, keepdim=True))  # of the graded ones
    return ((rewards == first) | ~graded).all(1).repeat_interleave(group)
