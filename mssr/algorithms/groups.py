"""The responses of one prompt, side by side: what GRPO and RLOO compare, and DAPO looks through."""

from torch import Tensor


def grouped(values: Tensor, group: int) -> Tensor:
    """[B / group, group] from [B], a prompt's responses in a row.

    Raises:
        ValueError: a group of one has nobody to be compared with, or groups do not fill the batch.
    """
    if group < 2 or len(values) % group:
        raise ValueError(f"{len(values)} responses in groups of {group}: need whole groups of at least 2")
    return values.view(-1, group)


def zero_variance(reward: Tensor, group: int) -> Tensor:
    """[B] bool, True at every response of a group whose rewards are all equal.

    Such a group has no gradient under GRPO and RLOO. DAPO's dynamic sampling (arXiv 2503.14476, section 3.2) puts other
    prompts in its place.

    Args:
        reward: [B], a prompt's responses side by side; a NaN equals nothing.
        group: responses of a prompt, at least 2.
    """
    rewards = grouped(reward, group)
    return (rewards == rewards[:, :1]).all(1).repeat_interleave(group)
