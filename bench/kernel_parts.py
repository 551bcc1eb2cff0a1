"""What `bench.kernels` runs in processes of their own. Each prints what it found, one line of JSON at a time.

python -m bench.kernel_parts roofs | cases | memory, with the request as JSON on standard input
"""

import json
import sys

from . import heap
from .jobs import Settings
from .shapes import Shape


def main(kind: str):
    request = json.load(sys.stdin)
    {"roofs": roofs, "cases": cases, "memory": memory}[kind](**request)


def say(**event):
    print(json.dumps(event), flush=True)


def roofs(device: str, dtypes: list[str]):
    from . import machine
    from .roofs import measure

    say(machine=machine.facts(device), roofs=measure(device, dtypes))


def cases(shape: dict, tasks: list[str], names: list[str], settings: dict):
    """Whoever starts as {"running": NAME}, every case as {"case": ...}."""
    from .cases import measure

    heap.keep()

    for case in measure(Shape(**shape), tasks, names, Settings(**settings), lambda name: say(running=name)):
        say(case=case)


def memory(shape: dict, tasks: list[str], name: str, settings: dict):
    """{"task", "peak_extra_mib"} of each task."""
    from .cases import peak_extra_mib

    heap.give_back()
    for task in tasks:
        say(task=task, peak_extra_mib=peak_extra_mib(Shape(**shape), task, name, Settings(**settings)))


if __name__ == "__main__":
    main(*sys.argv[1:])
