"""Whether two answers are equal, remembered for pairs that come again.

Most pairs are compared without the library for mathematics, which takes half a second to import: the first pair that needs
it pays for that.
"""

from functools import cache, lru_cache

from mssr.rewards.mathematics.compare import same_answer
from mssr.rewards.mathematics.symbolic import Mathematics

MAX_CHARS = 1024  # longer answers are equal only if identical: parsing them takes seconds
MEMO_SIZE = 65_536  # answer pairs


def equal(predicted: str, gold: str) -> bool:
    """Whether `predicted` says what `gold` says. May hang or use up all memory: call it where that can be ended."""
    predicted, gold = predicted.strip(), gold.strip()
    if predicted == gold:
        return True
    if not predicted or not gold or max(len(predicted), len(gold)) > MAX_CHARS:
        return False
    return _compared(predicted, gold)


@lru_cache(MEMO_SIZE)
def _compared(predicted: str, gold: str) -> bool:
    return same_answer(predicted, gold, lambda *question: _library()(*question))


@cache
def _library() -> Mathematics:
    return Mathematics()
