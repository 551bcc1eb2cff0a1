"""The parts of `bench.kernels` and `bench.scaling` that run in processes of their own, through `bench.child.events`.

python -m bench.parts, with {"kind": "roofs" | "cases" | "memory", ...} on standard input
"""

import json
import sys

from . import cases, heap, roofs
from .child import say
from .jobs import Settings
from .shapes import Shape


def main(kind: str, **request):
    {"roofs": of_roofs, "cases": of_cases, "memory": of_memory}[kind](**request)


def of_roofs(dtypes: list[str], settings: dict):
    say(roofs=roofs.measure(settings["device"], dtypes))


def of_cases(shape: dict, tasks: list[str], names: list[str], settings: dict):
    """Print each provider that starts as {"running": NAME}, and every case as {"case": ...}."""
    heap.keep()
    for case in cases.measure(Shape(**shape), tasks, names, Settings(**settings), lambda name: say(running=name)):
        say(case=case)


def of_memory(shape: dict, tasks: list[str], name: str, settings: dict):
    """Print {"task", "peak_extra_mib"} for each task, on a CPU."""
    heap.give_back()
    for task in tasks:
        say(task=task, peak_extra_mib=cases.peak_extra_mib(Shape(**shape), task, name, Settings(**settings)))


if __name__ == "__main__":
    main(**json.load(sys.stdin))
