"""The reward of this example, as a stranger to MSSR would write one: nothing is imported, and it runs in worker processes."""

import re


def counting(response, row):
    """Return two parts, which `reward.weights` adds up.

    accuracy: whether the response ends with the right count. The value tracker learns it, so it must be in [0, 1].
    brevity: what a right response leaves of the token limit. Small: a guess is shorter than a look, and must not pay more.
    """
    last = re.search(r"Answer: (\d+)\s*$", response)
    right = last is not None and last[1] == row.answer
    return {"accuracy": float(right), "brevity": right * (1 - row.tokens / row.max_tokens)}
