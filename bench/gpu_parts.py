"""What `bench.gpu` measures, each in a process of its own, which prints what it found as one line of JSON.

python -m bench.gpu_parts roofs | sync | step SIZE HEAD | measure MODEL N ROWS PROVIDER...
"""

import json
import sys


def main(kind: str, *words: str):
    found = {"roofs": roofs, "sync": sync, "step": step, "measure": measure}[kind](*words)
    print(json.dumps(found), flush=True)


def roofs() -> dict:
    from .roofs import measure

    return measure("cuda", ["bfloat16"])


def measure(model: str, n: str, rows: str, *names: str) -> dict:
    """{"cases"}: of `bench.kernels`, without its shares of a roof."""
    from . import cases, memory, shapes
    from .jobs import Settings
    from .providers import EAGER

    shape = shapes.of_model(model, int(n), "bfloat16", rows)
    found = cases.measure(shape, ["loss", "forward"], [EAGER, *names], Settings("cuda"))
    for case in found:
        memory.add_ratios(case, EAGER)
    return {"cases": found}


def sync() -> dict:
    """`bench.sync` at the dimensions of Qwen2.5-VL-7B."""
    from . import sync as benchmark

    (case,) = benchmark.measure(benchmark.parse_arguments(["--model", "7b", "--device", "cuda"]))["cases"]
    if "error" in case:
        raise RuntimeError(f"{case['error']}\n{case['output']}")
    return case


def step(size: str, head: str) -> dict:
    """A case of `bench.step`."""
    from . import step as benchmark

    arguments = benchmark.parse_arguments(["--size", size, "--repeats", "3", "--device", "cuda"])
    return benchmark.measure_here(head, arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
