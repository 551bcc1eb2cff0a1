"""Estimates response lengths from earlier responses, so that rollout engines can start the longest ones first."""

from collections.abc import Sequence


class ResponseLengths:
    """Remembers the length of every prompt's last response.

    The longest response of a step decides when generation ends. Longest responses start first, so that the tail
    overlaps with the rest.
    """

    def __init__(self) -> None:
        self._tokens: dict[str, int] = {}

    def observe(self, keys: Sequence[str], tokens: Sequence[int]) -> None:
        """Record response lengths. keys: of B prompts. tokens: the length of each response."""
        self._tokens.update(zip(keys, tokens, strict=True))

    def expected(self, keys: Sequence[str]) -> list[float]:
        """Return the expected length for each prompt; for a new one, the average of the known ones."""
        known = [self._tokens[key] for key in keys if key in self._tokens]
        average = sum(known) / len(known) if known else 0.0
        return [float(self._tokens.get(key, average)) for key in keys]

    def state_dict(self) -> dict[str, int]:
        return dict(self._tokens)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._tokens = dict(state)
