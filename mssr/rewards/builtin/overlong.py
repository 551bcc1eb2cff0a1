"""DAPO's soft overlong penalty (arXiv 2503.14476, equation 13)."""

from mssr.errors import UserError
from mssr.rewards.option_checks import require_number
from mssr.rewards.row import Row

USES_IMAGES = False


def overlong(response: str, row: Row, *, buffer: int) -> float:
    """Return the penalty, from 0 to -1, which grows with every token that a response takes of the last `buffer` ones.

    With L tokens and the limit M = `rollout.max_response_tokens`: 0 up to M - buffer, then (M - buffer - L) / buffer, which
    is -1 at M. DAPO: M = 20480, buffer = 4096.
    """
    if buffer > row.max_tokens:
        raise UserError(
            f"buffer: {buffer} is more than the {row.max_tokens} tokens of rollout.max_response_tokens; make it smaller"
        )
    free = row.max_tokens - buffer
    return max(-1.0, min(0.0, (free - row.tokens) / buffer))


def _check(*, buffer: int) -> None:
    require_number("buffer", buffer, at_least=1, whole=True)


overlong.check = _check
