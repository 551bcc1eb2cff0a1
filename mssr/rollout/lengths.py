"""How long a prompt's response will be, from its past ones: what a rollout engine begins first."""

from collections.abc import Sequence


class ResponseLengths:
    """Remembers the last response's length of every prompt.

    The longest response of a step decides when the step's generation ends; begun first, it has the most company.
    """

    def __init__(self) -> None:
        self._tokens: dict[str, int] = {}

    def observe(self, keys: Sequence[str], tokens: Sequence[int]) -> None:
        """B prompts' keys and the lengths of their responses."""
        self._tokens.update(zip(keys, tokens, strict=True))

    def expected(self, keys: Sequence[str]) -> list[float]:
        """Of each prompt; one never seen is taken to be as long as the average one."""
        known = [self._tokens[key] for key in keys if key in self._tokens]
        average = sum(known) / len(known) if known else 0.0
        return [float(self._tokens.get(key, average)) for key in keys]

    def state_dict(self) -> dict[str, int]:
        return dict(self._tokens)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._tokens = dict(state)


def longest_first(expected_tokens: Sequence[float] | None, count: int) -> list[int]:
    """The rows 0..count-1 in the order in which to begin them; without expectations as they come."""
    if expected_tokens is None:
        return list(range(count))
    return sorted(range(count), key=lambda row: -expected_tokens[row])
