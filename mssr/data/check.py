"""Checks every row of a source before a run starts. The ranks share the work and exchange the results."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from mssr.data.columns import Row
from mssr.data.prefetch import worker_count
from mssr.data.prompts import PromptEncoder, TooLong, why_unusable
from mssr.distributed import ALONE, World
from mssr.errors import UserError


class Contents(NamedTuple):
    """What a row holds, without images and long texts: its key (of images and problem), answer, sha256 of its solution.

    conversation, own_system: as in `Problem`. structured: whether the answer is a list or object.
    """

    key: str
    answer: str
    solution: bytes
    conversation: bool
    own_system: bool
    structured: bool


class Refused(NamedTuple):
    """Why a row cannot be used, and whether that is the prompt's length."""

    reason: str
    too_long: bool


def check_rows(
    rows: Sequence[Row],
    encoder: PromptEncoder,
    source: str,
    world: World = ALONE,
    advance: Callable[[int, int], None] = lambda by, total: None,
) -> list[Contents | Refused]:
    """Return what is in each row, in order; the same list on every rank.

    world: the ranks that check `source` together, each every size-th row.
    advance: called with the rows checked since its last call, over all ranks, and the number of rows.

    Raises:
        UserError: the ranks do not see the same number of rows.
    """

    def check(row: int) -> Contents | Refused:
        """Return what is in the row, or the reason why it cannot be used."""
        try:
            columns = rows[row]
            problem = encoder.check(columns)
        except Exception as error:
            return Refused(why_unusable(error), isinstance(error, TooLong))
        solution = hashlib.sha256((problem.solution or "").encode()).digest()
        structured = isinstance(columns.get("answer"), list | dict)
        return Contents(
            problem.key, problem.answer.strip(), solution, problem.conversation, problem.own_system, structured
        )

    mine = range(world.rank, len(rows), world.size)
    found = [check(row) for row in mine[:1]]  # alone: on its first call a tokenizer changes its state
    with ThreadPoolExecutor(worker_count()) as threads:
        for row in threads.map(check, mine[1:]):
            found.append(row)
            advance(world.size, len(rows))
    shares = world.gather((len(rows), found))
    for other, (count, _) in enumerate(shares):
        if count != shares[0][0]:
            raise UserError(
                f"{source}: {count} rows on rank {other}, {shares[0][0]} on rank 0; give every node the same files"
            )
    return [shares[row % world.size][1][row // world.size] for row in range(len(rows))]
