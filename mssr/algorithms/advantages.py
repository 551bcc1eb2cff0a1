"""Advantages: from a step's rewards to one number per response. `ALGORITHMS` is the table of algorithms.

Pure functions of `Outcomes`. They compute in float64: there the mean of equal float32 rewards is exactly their value, so
that equal rewards give advantages of exactly 0. In float32 the mean can be an ulp off, which normalisation would turn into
advantages of +-1. No import of torch: the configuration reads the table too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Outcome of all B responses of a step, over all ranks; the responses of a prompt are adjacent.

    reward: [B] float32.
    baseline: [B] float32, the tracker's values before it saw these rewards; None without a tracker.
    lengths: [B] int64, tokens of each response that count in the loss; 0 for a masked response.
    group: responses per prompt; divides B.
    """

    reward: Tensor
    baseline: Tensor | None
    lengths: Tensor
    group: int


def single_rollout(outcomes: Outcomes) -> Tensor:
    """Normalised r - v, v from the value tracker: MSSR and MVSR (arXiv 2512.18215), SPO (arXiv 2509.13232).

    The paper's MVSR is MSSR without entropy shaping; in the authors' scripts that switch is the only difference. SPO draws
    prompts by uncertainty (`prompt_sampling`). Differences from SPO's recipe for verl: weights go over the whole data set,
    not over a larger batch of the epoch; the std is the biased one (a factor of sqrt(1 - 1/B)); a prompt starts from
    `algorithm.tracker.n_init` rollouts; dual clip and KL term are on unless switched off.
    """
    return batch_normalise(outcomes.reward - outcomes.baseline)


def grpo(outcomes: Outcomes) -> Tensor:
    """(r - mean) / (std + 1e-6) within a prompt's responses: GRPO (arXiv 2402.03300, section 4.1.2).

    The paper leaves the std open and has no eps. Both are EasyR1's, which the GRPO runs of arXiv 2512.18215 used: unbiased
    std (divided by group - 1), eps = 1e-6. With rewards 0 and 1 the smallest std is 1 / sqrt(group), so eps only matters
    where all rewards are equal, and there A is exactly 0. The loss is the shared one: its mean is over all tokens of an
    update; the paper's is over a response's tokens, then over responses.
    """
    reward = grouped(outcomes.reward.double(), outcomes.group)
    centred = reward - reward.mean(1, keepdim=True)
    return (centred / (reward.std(1, keepdim=True) + 1e-6)).flatten().to(outcomes.reward.dtype)


def rloo(outcomes: Outcomes) -> Tensor:
    """r - mean of the prompt's other responses: RLOO (arXiv 2402.14740). Not normalised.

    The paper takes one gradient step on the probability of a whole response; here, as in EasyR1, A goes into the clipped
    loss of each token.
    """
    reward = grouped(outcomes.reward.double(), outcomes.group)
    others = (reward.sum(1, keepdim=True) - reward) / (outcomes.group - 1)
    return (reward - others).flatten().to(outcomes.reward.dtype)


def reinforce_pp(outcomes: Outcomes) -> Tensor:
    """Rewards whitened over all tokens of the batch: REINFORCE++ (arXiv 2501.03262). No group, no baseline.

    The paper's return of a token is the reward minus the KL of the tokens to come. As in EasyR1 the KL is in the loss, and
    there is no discount: all tokens of a response have its reward as return, so mean and variance weigh every response by
    its length.
    """
    return whiten_over_tokens(outcomes.reward, outcomes.lengths)


@dataclass(frozen=True)
class Algorithm:
    """One value of `algorithm.name`.

    advantages: Outcomes -> [B] float32, in the order of the outcomes.
    tracked: `Outcomes.baseline` comes from the value tracker. grouped: compares several responses to a prompt.
    shaped: the loss shapes advantages by each token's entropy. prioritised: prompts are drawn by uncertainty by default.
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
    """(A - mean) / std over all given sequences, biased variance (arXiv 2512.18215). A NaN makes everything NaN.

    One sequence, or equal advantages, carry no information about which response was better: zeros.

    Args:
        advantage: [B], the sequences of all ranks.

    Returns:
        [B], the dtype of `advantage`.
    """
    shifted = (advantage - advantage[:1]).double()  # makes the std of equal advantages exactly 0
    centred = shifted - shifted.mean()
    std = centred.square().mean().sqrt()
    return (centred / std).masked_fill(std == 0, 0.0).to(advantage.dtype)


def whiten_over_tokens(value: Tensor, lengths: Tensor) -> Tensor:
    """(value - mean) / sqrt(variance + 1e-8), each value counted once per token of its response.

    As EasyR1's and verl's `masked_whiten`: the variance is divided by the number of tokens minus 1. A NaN makes everything
    NaN.

    Args:
        value: [B] float32.
        lengths: [B] int64; a response of 0 tokens counts in neither mean nor variance.

    Returns:
        [B] float32.
    """
    weight, wide = lengths.double(), value.double()
    tokens = weight.sum()
    centred = wide - (weight * wide).sum() / tokens.clamp(min=1)
    variance = (weight * centred.square()).sum() / (tokens - 1).clamp(min=1)
    return (centred / (variance + 1e-8).sqrt()).to(value.dtype)


def grouped(values: Tensor, group: int) -> Tensor:
    """Reshape [B] to [B / group, group], the responses of a prompt in a row.

    Raises:
        ValueError: a group of one cannot be compared, or groups do not fill the batch.
    """
    if group < 2 or len(values) % group:
        raise ValueError(f"{len(values)} responses in groups of {group}: need whole groups of at least 2")
    return values.view(-1, group)


def zero_variance(reward: Tensor, group: int) -> Tensor:
    """[B] bool, True at every response of a group whose rewards are all equal.

    Such a group has no gradient under GRPO and RLOO; DAPO's dynamic sampling (arXiv 2503.14476, section 3.2) replaces it.

    Args:
        reward: [B], a prompt's responses adjacent; a NaN equals nothing.
        group: responses per prompt, at least 2.
    """
    rewards = grouped(reward, group)
    return (rewards == rewards[:, :1]).all(1).repeat_interleave(group)
