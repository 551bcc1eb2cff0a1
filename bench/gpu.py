"""What a GPU can do, in one command: its roofs, the kernels at the heads of Qwen2.5-VL, updates of a 7B and a 3B if the
trainer is installed, and the weight sync of a 7B if vLLM is. `make gpu` runs tests/gpu first.

    python -m bench.gpu [--out DIR] [--budget-minutes 5]

For one H200; or an H100 or A100 with 80 GB, where the 3B's updates do not fit. Writes DIR/gpu.json (by default below
bench/results) after every part. Each part runs in processes of its own and within its own time limit, so that one which
fails, hangs or is not reached costs no other. Exit code: 1 if a part or one of our providers failed, else 0; what is not
installed is "not run".

The figures are those of `python -m bench.kernels --help`.
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path

import torch

from . import child, kernels, shapes, tables
from . import report as report_of
from .jobs import Settings
from .machine import why_no_trainer
from .report import failures, is_ours

SYNC_LIMIT, STEP_LIMIT, LEAST = 90, 90, 15  # seconds
OURS = ("mssr L", "mssr S", "mssr G", "mssr forward")
# All but our own eager reference, whose float32 products take longer than all of these together.
ALL = (
    *OURS, "mssr chunked L", "mssr chunked forward", "torch.compile", "liger GRPO", "liger CE", "torch linear CE",
    "torch linear CE chunked",
)  # fmt: skip
# Measured separately: they may compile or try out configurations for long, or not run on this GPU at all.
OTHERS = ("liger scaled CE", "trl", "verl", "verl torch", "cce", "cce exact", "cce torch_compile", "quack CE")
LARGE, SMALL = "qwen2.5-vl-7b", "qwen2.5-vl-3b"
FIRST = (  # (model, N, rows, providers besides eager), the most important first
    (LARGE, 8192, "realistic", ALL),
    (LARGE, 8192, "peaked", OURS),
    (LARGE, 8192, "flat", OURS),
    (SMALL, 8192, "realistic", ALL),
)
LAST = (  # after the updates
    (LARGE, 8192, "realistic", OTHERS),
    (SMALL, 8192, "peaked", OURS),
    (SMALL, 8192, "flat", OURS),
    (LARGE, 2048, "realistic", ALL),
    (SMALL, 2048, "realistic", ALL),
)
STEPS = ("7b-lora", "3b")  # of bench.step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for gpu.json")
    parser.add_argument("--budget-minutes", type=float, default=5)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench.gpu needs a CUDA device, and torch sees none")
    os.environ["TRITON_INTERPRET"] = "0"  # the children inherit it
    return Run(arguments.out, time.monotonic() + 60 * arguments.budget_minutes).everything()


class Run:
    """The parts in order, and the report, saved after each. ends: by time.monotonic()."""

    def __init__(self, out: Path | None, ends: float):
        self.ends, settings = ends, Settings("cuda")
        self.report = report_of.new("bench.gpu", None, "cuda", settings._asdict())
        self.report |= {"steps": [], "sync": None, "failed": []}
        machine = re.sub(r"[^a-z0-9]+", "-", self.report["machine"]["device"].lower()).strip("-")
        self.path = (out or child.ROOT / f"bench/results/{machine}_{self.report['date']}") / "gpu.json"
        self.kernels = kernels.Run(self.report, self.path, settings, ends)

    def everything(self) -> int:
        try:
            self.kernels.roofs(["bfloat16"])
        except child.Died as error:
            self.fail(f"roofs: {error}", error.output)
        self.measure(FIRST)
        if why := why_no_trainer():
            self.report["not_run"].append(f"updates and sync: {why}")
        else:
            self.sync()
            self.steps()
        self.measure(LAST)
        report_of.show(tables.gpu(self.report))
        print(self.path)
        return int(bool(self.report["failed"]))

    def measure(self, measurements: tuple):
        for model, n, rows, providers in measurements:
            shape = shapes.of_model(model, n, "bfloat16", rows)
            if not self.has_time(str(shape)):
                continue
            cases = self.kernels.measure(shape, ["loss", "forward"], list(providers))
            if len(cases) < 2 and self.left() > 0:
                self.fail(self.report["not_run"][-1])
            for case in cases:
                for provider, error in failures(case).items():
                    if is_ours(provider):
                        self.fail(f"{provider}, {report_of.name(case)}: {error}")

    def sync(self):
        from . import sync

        if self.has_time("sync"):
            arguments = sync.parse_arguments(["--model", "7b", "--device", "cuda"])
            self.report["sync"] = sync.measure(arguments, limit=min(SYNC_LIMIT, self.left()))
            self.add_failures("sync", self.report["sync"]["cases"])

    def steps(self):
        from . import step

        for size in STEPS:
            if self.has_time(f"updates of {size}"):
                arguments = step.parse_arguments(["--size", size, "--repeats", "3", "--device", "cuda"])
                found = step.measure(arguments, limit=min(STEP_LIMIT, self.left() / len(arguments.heads)))
                self.report["steps"].append(found)
                self.add_failures(f"updates of {size}", found["cases"])

    def add_failures(self, part: str, cases: list[dict]):
        for case in cases:
            if "error" in case:
                self.fail(f"{part}, {case.get('head', case.get('mode'))}: {case['error']}", case["output"])
            elif not case.get("agrees", True):
                self.fail(f"{part}, {case['head']}: differs from eager by {case['differs']:.0e}")
        self.kernels.save()

    def fail(self, why: str, output: str = ""):
        print(f"{why}\n{output}", flush=True)
        self.report["failed"].append({"why": why, "output": output})
        self.kernels.save()

    def left(self) -> float:
        return self.ends - time.monotonic()

    def has_time(self, part: str) -> bool:
        if self.left() < LEAST:
            self.report["not_run"].append(f"{part}: out of time")
        return self.left() >= LEAST


if __name__ == "__main__":
    sys.exit(main())
