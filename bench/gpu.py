"""Everything that needs a GPU, in one command: tests/gpu, the machine's roofs, the benchmark at the heads of Qwen2.5-VL,
updates of a 7B and a 3B where the trainer is installed, and the weight sync of a 7B where vLLM is.

    python -m bench.gpu [--out DIR] [--budget-minutes 8] [--skip-tests]

One H200, or an H100 or A100 with 80 GB, where the 3B's updates do not fit. Writes DIR/gpu.json (by default below
bench/results) after every part, so that a part which fails, hangs or is not reached costs no other; each runs in a process
and within a time limit of its own. Ends with 1 if a test or a part failed.

What the figures of a head are: `python -m bench.kernels --help`. Shares are of a roof measured in the same run.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from rich.console import Console

from . import machine
from .losses import sentences
from .tables import name_of, table
from .targets import beside_targets, with_rates

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "gpu"
# In this order: without the first nothing else can work. What stands together runs at one time, since most of it is
# compilation on the host, and fits into 80 GB.
TEST_FILES = (("wiring",), ("heads", "rows", "active"), ("bits", "memory"), ("large",), ("vllm",))
TEST_SHARE = 0.55  # of the budget; the rest is for the benchmark
TEST_LIMIT, MEASURE_LIMIT, SYNC_LIMIT, STEP_LIMIT, LEAST = 150, 150, 90, 90, 15  # seconds
GIB = 1 << 30
OURS = ("mssr exact", "mssr sparse", "mssr recompute", "mssr forward")
# All but our own eager reference, whose float32 products take longer than all of these together.
ALL = (
    *OURS, "mssr chunked exact", "mssr chunked forward", "torch.compile", "liger GRPO", "liger CE", "torch linear CE",
    "torch linear CE chunked",
)  # fmt: skip
# Apart from those: they may compile or try out configurations for long, or not run on this GPU at all.
OTHERS = ("liger scaled CE", "trl", "verl", "verl torch", "cce", "cce exact", "cce torch_compile", "quack CE")
LARGE, SMALL = "qwen2.5-vl-7b", "qwen2.5-vl-3b"
MEASUREMENTS = (  # (model, N, rows, providers beside eager), the most telling first
    (LARGE, 8192, "realistic", ALL),
    (LARGE, 8192, "peaked", OURS),
    (LARGE, 8192, "flat", OURS),
    (SMALL, 8192, "realistic", ALL),
    (LARGE, 8192, "realistic", OTHERS),
    (SMALL, 8192, "peaked", OURS),
    (SMALL, 8192, "flat", OURS),
    (LARGE, 2048, "realistic", ALL),
    (SMALL, 2048, "realistic", ALL),
)  # fmt: skip
# What comes before the updates; the rest of MEASUREMENTS, which says least, comes after them.
FIRST_MEASUREMENTS = 4
STEPS = (("7b-lora", ("mssr", "eager", "liger")), ("3b", ("mssr", "eager", "liger")))  # of bench.step


def main():
    arguments = parse_arguments()
    if not torch.cuda.is_available():
        sys.exit("bench.gpu needs a CUDA device, and torch sees none")
    sys.exit(Run(arguments).everything())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for gpu.json")
    parser.add_argument("--budget-minutes", type=float, default=8)
    parser.add_argument("--skip-tests", action="store_true")
    return parser.parse_args()


class Run:
    """The parts in order, and the report, on disk after each."""

    def __init__(self, arguments: argparse.Namespace):
        self.start = time.monotonic()
        self.budget, self.skip_tests = arguments.budget_minutes * 60, arguments.skip_tests
        facts = machine.facts("cuda")
        today = datetime.date.today().isoformat()
        slug = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
        self.path = (arguments.out or ROOT / "bench" / "results" / f"{slug}_{today}") / "gpu.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        facts["memory_gib"] = torch.cuda.get_device_properties(0).total_memory / GIB
        facts["devices"] = torch.cuda.device_count()
        self.report = {
            "command": " ".join(["python -m bench.gpu", *sys.argv[1:]]),
            "date": today,
            "machine": facts,
            "roofs": None,
            "tests": {},
            "measurements": [],
            "steps": {},
            "sync": None,
            "targets": [],
            "not_run": [],
            "failed": [],
        }

    def everything(self) -> int:
        self.save()
        self.report["roofs"] = self.part("roofs", ["roofs"], 60)
        self.save()
        if not self.skip_tests:
            self.tests()
        self.measure(MEASUREMENTS[:FIRST_MEASUREMENTS])
        self.report["sync"] = {"skipped": why} if (why := why_no_sync()) else self.part("sync", ["sync"], SYNC_LIMIT)
        self.save()
        self.steps()
        self.measure(MEASUREMENTS[FIRST_MEASUREMENTS:])
        self.show()
        return int(bool(self.report["failed"]))

    def measure(self, measurements: tuple):
        for model, n, rows, providers in measurements:
            found = self.part(f"measure {model} N {n} {rows}", ["measure", model, str(n), rows, *providers])
            if found is not None:
                self.report["measurements"] += [with_rates(case, self.report["roofs"]) for case in found["cases"]]
            self.save()

    def steps(self):
        if why := why_no_trainer():
            self.report["not_run"].append(f"updates: {why}")
            return
        from .step import compare

        for size, heads in STEPS:
            found = [self.part(f"step {size} {head}", ["step", size, head], STEP_LIMIT) for head in heads]
            cases = [case for case in found if case is not None]
            compare(cases, "bfloat16")
            for case in cases:
                if not case.get("agrees", True):
                    why = f"differs from eager by {case['differs']:.0e}"
                    self.report["failed"].append({"part": f"step {size} {case['head']}", "why": why, "output": ""})
            self.report["steps"][size] = cases
            self.save()

    def left(self) -> float:
        return self.budget - (time.monotonic() - self.start)

    def part(self, name: str, words: list[str], limit: float = MEASURE_LIMIT) -> dict | None:
        """The object that the part prints on a line; None where it failed or was not reached."""
        limit = min(limit, self.left())
        if limit < LEAST:
            self.report["not_run"].append(f"{name}: out of time")
            return None
        code, output = run([sys.executable, "-m", "bench.gpu_parts", *words], limit)
        result = [line for line in output.splitlines() if line.startswith('{"')]
        if code == 0 and result:
            return json.loads(result[-1])
        why = f"over its {limit:.0f} s" if code is None else f"exit code {code}"
        self.report["failed"].append({"part": name, "why": why, "output": output[-3000:]})
        print(f"{name}: {why}\n{output[-1500:]}", flush=True)
        return None

    def tests(self):
        ends = time.monotonic() + self.left() - self.budget * (1 - TEST_SHARE)
        for names in TEST_FILES:
            limit = min(TEST_LIMIT, ends - time.monotonic())
            if limit < LEAST:
                for name in names:
                    self.report["not_run"].append(f"{test_file(name)}: out of time")
                    self.report["failed"].append({"part": test_file(name), "why": "out of time", "output": ""})
                continue
            with ThreadPoolExecutor(len(names)) as pool:
                results = list(pool.map(lambda name, limit=limit: run_tests(test_file(name), limit), names))
            for name, found in zip(names, results):
                self.add_tests(name, found)
            self.save()

    def add_tests(self, name: str, found: dict):
        file, failures = test_file(name), found["failures"]
        self.report["tests"][name] = found
        print(f"{file}: {found['passed']} passed, {len(failures)} failed, {found['seconds']:.0f} s", flush=True)
        for failure in failures[:12]:
            print(f"    {failure['test']}: {failure['message']}", flush=True)
        if found["why"]:
            print(f"    not complete: {found['why']}\n{found['output'][-1500:]}", flush=True)
        if failures or found["why"]:
            why = found["why"] or f"{len(failures)} tests failed"
            self.report["failed"].append({"part": file, "why": why, "output": ""})

    def save(self):
        self.report["targets"] = beside_targets(self.report["measurements"], self.report["sync"])
        self.report["seconds"] = time.monotonic() - self.start
        self.path.write_text(json.dumps(self.report, indent=2) + "\n")

    def show(self):
        print(", ".join(f"{key} {value}" for key, value in self.report["machine"].items()))
        if self.report["roofs"]:
            print(f"roofs: {self.report['roofs']}")
        console = Console(width=160, highlight=False)
        for case in self.report["measurements"]:
            console.print(table(case))
        for sentence in sentences({"cases": self.report["measurements"]}, name_of):
            console.print(f"slower or larger: {sentence}")
        for size, cases in self.report["steps"].items():
            show_steps(size, cases)
        print("\nTargets (7B head, bf16, N 8192, one H200) and what was measured; GiB of the head's modes beyond dW")
        for row in self.report["targets"]:
            print(f"{row['what']:<44}{row['memory']:<22}{row['time']:<40}{row['measured']}")
        for line in self.report["not_run"]:
            print(f"not run: {line}")
        for failure in self.report["failed"]:
            print(f"FAILED {failure['part']}: {failure['why']}")
        print(self.path)


def run(command: list[str], limit: float) -> tuple[int | None, str]:
    """(exit code, or None where the time limit ended it; output). The first signal lets pytest write its report."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with tempfile.TemporaryFile("w+") as log:
        options = dict(stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True)
        with subprocess.Popen(command, **options) as process:
            code = None
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(8)
            finally:  # whatever it started goes with it
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        log.seek(0)
        return code, log.read()


def test_file(name: str) -> str:
    return f"tests/gpu/test_gpu_{name}.py"


def run_tests(file: str, limit: float) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "junit.xml"
        # tests/conftest.py is for the trainer's tests: its libraries need not be here.
        options = ["-q", "-p", "no:cacheprovider", "--confcutdir", str(TESTS), "--durations=5", "--tb=short"]
        began = time.monotonic()
        code, output = run([sys.executable, "-m", "pytest", *options, f"--junitxml={xml}", file], limit)
        cases = list(ElementTree.parse(xml).getroot().iter("testcase")) if xml.exists() else []
    failures, skipped = [], 0
    for case in cases:
        bad = next((child for child in case if child.tag in ("failure", "error")), None)
        skipped += any(child.tag == "skipped" for child in case)
        if bad is not None:
            message = (bad.get("message") or bad.text or "").strip().splitlines() or [""]
            failures.append({"test": case.get("name"), "message": message[0][:300]})
    why = {0: None, 1: None, None: f"over its {limit:.0f} s", 5: "nothing collected"}.get(code, f"exit code {code}")
    return {
        "why": why,
        "passed": len(cases) - len(failures) - skipped,
        "skipped": skipped,
        "failures": failures,
        "seconds": time.monotonic() - began,
        "output": output[-6000:] if why or failures else "",
    }


def why_no_trainer() -> str | None:
    """Updates and sync take the trainer, without which the rest of this command does."""
    try:
        import mssr.policy.engine  # noqa: F401
    except ImportError as error:
        return f"the trainer is not installed ({error})"
    return None


def why_no_sync() -> str | None:
    if why := why_no_trainer():
        return why
    from mssr.rollout.vllm.adapter import why_unusable

    return why_unusable("cuda")


def show_steps(size: str, cases: list[dict]):
    from .step import print_cases

    print(f"\nupdate of {size}")
    print_cases(cases, Console(width=160, highlight=False))


if __name__ == "__main__":
    main()
