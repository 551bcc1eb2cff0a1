"""Texts that end a response (`rollout.stop`), found in its tokens.

A text may be split over tokens in any way, also within a character, and end inside a token. Every engine cuts its finished
responses with `StopTexts.length`, so that all give the same tokens; how soon an engine notices decides only how many
tokens it generates for nothing.
"""

from bisect import bisect_left
from collections.abc import Sequence


class StopTexts:
    """A response keeps its tokens up to the first one after which its text contains a stop text. That token stays whole.

    texts: none of them is empty; without any, nothing is decoded.
    """

    def __init__(self, texts: Sequence[str] = (), tokenizer=None) -> None:
        self.texts = list(texts)
        self._tokenizer = tokenizer
        # A token has at least one byte: a text that ends in the last token begins at most this many tokens before.
        self.longest = max((len(text.encode()) for text in texts), default=0)

    def length(self, tokens: list[int]) -> int | None:
        """Return the number of tokens up to the first stop text, included; None if there is none."""
        if not self.texts or not self.found([tokens])[0]:
            return None
        return bisect_left(range(len(tokens)), True, key=lambda last: self.found([tokens[: last + 1]])[0]) + 1

    def found(self, rows: list[list[int]]) -> list[bool]:
        """Return for each row of tokens whether its text contains a stop text."""
        decoded = self._tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return [any(text in row for text in self.texts) for row in decoded]
