"""Memory that a benchmark needs: said, and compared with what is free, before anything starts."""

import sys
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple, TypeVar

from . import machine
from .memory import GIB

Case = TypeVar("Case", bound=Hashable)


class Need(NamedTuple):
    """words: what needs the memory. way_out: told the free bytes, says what would fit."""

    words: str
    nbytes: int
    way_out: Callable[[int], str]


def fitting(needs: Mapping[Case, Need], device: str, noun: str) -> tuple[list[Case], dict[Case, str]]:
    """Return the cases that fit into memory, and why each of the others does not; print both. Exit with 2 if none fits.

    noun: what a case is: "shape".
    """
    have = machine.free_bytes(device)
    fit = [case for case, need in needs.items() if need.nbytes <= have]
    why = {
        case: f"{need.words}: needs about {gib(need.nbytes)} of memory, {gib(have)} are free; {need.way_out(have)}"
        for case, need in needs.items()
        if case not in fit
    }
    for line in why.values():
        say(f"not run: {line}")
    if why and not fit:
        sys.exit(2)
    if fit:
        count = f"1 {noun}" if len(fit) == 1 else f"{len(fit)} {noun}s"
        say(f"{count}, up to about {gib(max(needs[case].nbytes for case in fit))} of memory; {gib(have)} are free")
    return fit, why


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
