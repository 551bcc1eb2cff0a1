"""The policy loss fused with the head, compared with eager PyTorch and with its alternatives: time, memory, accuracy.

    python -m bench.kernels --quick [--out FOLDER]      two CPU cores, under 5 minutes
    python -m bench.kernels --full [--out FOLDER]       a GPU: the heads of Qwen2.5-VL 3B and 7B, stops after 8.5 minutes
    python -m bench.kernels --model llama-3.1-8b gemma-2-9b --n 4096 --rows peaked flat --task loss frozen
    python -m bench.kernels --n 2048 --d 1024 --v 65536

Time: the providers take turns on the same inputs, and a ratio is the median of the ratios to eager within turns. On a CPU
the process keeps freed memory, and a run is repeated if the host took the processors away (`bench.steal`).
Memory: the peak beyond the inputs, gradients included; from the allocator on CUDA, from a process per provider on a CPU.
Errors: against float64 with the same inputs.
Share of roof: the time that the job's products or its memory traffic take at the rates measured in the same run, over its
time; above 100 % if caches served what is counted as traffic, or the machine was slower when its roofs were measured.
A provider that is not installed is listed as "not installed", one that fails with its error.

Tasks: "loss" is forward and backward with all gradients, "frozen" without the head's gradient, "forward" log-probs and
entropy without gradients (or the loss, from providers that return only that). Every shape is measured in a process of its
own, so that a provider which crashes or hangs costs only its own figures; --out has kernels.json after every case.
Exit code: 1 if one of ours failed, else 0.

The head of --quick is far narrower than a model's: passes over the logits weigh more in it, and chunks of few rows make
products slower. Its time ratios are not those of a model's head.
"""

import argparse
import itertools
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from . import inputs, memory, shapes, tables
from . import report as report_of
from .child import Died, OutOfTime, events
from .jobs import TASKS, Settings
from .providers import PROVIDERS
from .report import EAGER, measured
from .roofs import share
from .shapes import MODELS, Shape

# Seconds without news until a provider counts as hanging: the first run compiles, and some packages try out dozens of
# configurations.
SILENCE = {"cpu": 600, "cuda": 120}
REFERENCE = "mssr reference"  # at the heads of large models its float32 products take longer than all others together
SLOW = "torch linear CE chunked"  # would take a fifth of the time of --quick
MEMORY_PROCESSES = 2  # at a time; they do not disturb each other's figures


def main(words: list[str] | None = None) -> int:
    arguments = parse_arguments(words)
    settings = Settings(
        arguments.device, arguments.repeats, arguments.seed, arguments.workspace_mib, arguments.vocab_drop_tol
    )
    report = report_of.new("bench.kernels", words, arguments.device, settings._asdict())
    if arguments.quick and SLOW not in arguments.providers:
        report["not_run"].append(f"{SLOW}: left out of --quick")
    path = arguments.out and (arguments.out if arguments.out.suffix == ".json" else arguments.out / report_of.KERNELS)
    ends = time.monotonic() + 60 * arguments.minutes if arguments.minutes else math.inf
    run = Run(report, path, settings, ends)
    try:
        run.roofs(arguments.dtype)
        for shape in shapes_of(arguments):
            run.measure(shape, arguments.task, arguments.providers)
    except Died as error:
        sys.exit(f"bench.kernels: a plain product on {arguments.device} was not measured: {error}")
    except KeyboardInterrupt:
        report["not_run"].append("the rest: interrupted")
        run.save()
    report_of.show(tables.kernels(report))
    return int(any(report_of.is_ours(name) for case in report["cases"] for name in report_of.failures(case)))


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="Several values of an option make several cases. Without a shape: --full on a GPU, else --quick.",
    )
    preset = parser.add_mutually_exclusive_group()
    preset.add_argument("--quick", action="store_true", help="a small shape, for two CPU cores")
    preset.add_argument("--full", action="store_true", help="Qwen2.5-VL 3B and 7B at N 2048, 8192 and 32768, for a GPU")
    parser.add_argument("--model", nargs="+", choices=sorted(MODELS), help="heads by name (D, V and softcap)")
    parser.add_argument("--n", nargs="+", type=positive, help="tokens (default 2048)")
    parser.add_argument("--d", type=positive, help="hidden size, where there is no --model (default 1024)")
    parser.add_argument("--v", type=positive, help="vocabulary, where there is no --model (default 65536)")
    parser.add_argument("--softcap", type=float, help="logit softcap, where there is no --model (default none)")
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), help="default float32 on CPU, else bfloat16"
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=sorted(inputs.KINDS),
        default=["realistic"],
        help="distributions of the rows (default realistic)",
    )
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS), help="what to measure (default all)")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default cuda if available, else cpu",
    )
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, metavar="NAME", help="only these, and eager")
    parser.add_argument(
        "--workspace-mib",
        type=positive,
        help="workspace limit; also caps the peers' chunks (default 256, with --quick 8)",
    )
    parser.add_argument("--vocab-drop-tol", type=float, default=2.0**-8, help="tolerance of mode sparse (default 2^-8)")
    parser.add_argument("--repeats", type=positive, help="repetitions (default 20, with --quick 32)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs (default 0)")
    parser.add_argument(
        "--minutes", type=float, help="time limit in minutes; skipped cases are listed (default 8.5 with --full)"
    )
    parser.add_argument("--out", type=Path, metavar="WHERE", help="folder for kernels.json, or a FILE.json")
    arguments = parser.parse_args(words)
    given = (arguments.model, arguments.n, arguments.d, arguments.v)
    if (arguments.quick or arguments.full) and any(given):
        parser.error("--quick and --full have their own shapes: remove --model, --n, --d and --v")
    if not any(given):
        arguments.full = arguments.full or (arguments.device == "cuda" and not arguments.quick)
        arguments.quick = not arguments.full
    arguments.dtype = arguments.dtype or ["float32" if arguments.device == "cpu" else "bfloat16"]
    if arguments.quick:
        arguments.n, arguments.d, arguments.v = [512], 256, 16384
    if arguments.full:
        # The most important first, in case the time runs out.
        arguments.model, arguments.n = ["qwen2.5-vl-7b", "qwen2.5-vl-3b"], [8192, 2048, 32768]
        arguments.minutes = arguments.minutes or 8.5
    if arguments.model and (arguments.d or arguments.v or arguments.softcap):
        parser.error("--model sets D, V and softcap: remove --d, --v and --softcap")
    # With --quick smaller than the logits, as it is for a real head.
    arguments.workspace_mib = arguments.workspace_mib or (8 if arguments.quick else 256)
    arguments.repeats = arguments.repeats or (32 if arguments.quick else 20)
    if arguments.providers is None:
        large = arguments.quick or arguments.model
        left_out = {REFERENCE} if large else set()
        left_out |= {SLOW} if arguments.quick else set()
        arguments.providers = [name for name in PROVIDERS if name not in left_out]
    return arguments


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def shapes_of(arguments: argparse.Namespace) -> list[Shape]:
    found = []
    for n, dtype, rows in itertools.product(arguments.n or [2048], arguments.dtype, arguments.rows):
        if arguments.model:
            found += [shapes.of_model(model, n, dtype, rows) for model in arguments.model]
        else:
            found.append(Shape(None, n, arguments.d or 1024, arguments.v or 65536, dtype, rows, arguments.softcap))
    return found


class Run:
    """Fills a report shape by shape; saves it after every case."""

    def __init__(self, report: dict, path: Path | None, settings: Settings, ends: float = math.inf):
        """report: of `bench.report.new`. ends: when the time is up, by time.monotonic()."""
        self.start = time.monotonic()
        self.report, self.path, self.settings, self.ends = report, path, settings, ends

    def roofs(self, dtypes: list[str]):
        """Raises:
        Died: a plain product could not be measured.
        """
        (found,) = self.part("roofs", device=self.settings.device, dtypes=dtypes)
        self.report |= found
        self.save()

    def measure(self, shape: Shape, tasks: list[str], names: list[str]) -> list[dict]:
        """Return the cases, which are also in the report. names: the providers; eager is always measured, first."""
        found: list[dict] = []
        died: dict[str, str] = {}
        while left := tasks[len(found) :]:
            running = ""
            here = [name for name in PROVIDERS if name not in died and (name in names or name == EAGER)]
            try:
                for event in self.part("cases", shape=shape._asdict(), tasks=left, names=here):
                    running = event.get("running", "")
                    if "case" in event:
                        found.append(self.add(event["case"], died))
            except Died as error:
                if isinstance(error, OutOfTime) or not running:
                    self.report["not_run"] += [f"{shape} {task}: {error}" for task in left]
                    break
                died[running] = f"took its process down: {error}"
        if self.settings.device == "cpu":
            self.measure_memory(shape, names, found)
        self.save()
        return found

    def add(self, case: dict, died: dict[str, str]) -> dict:
        """Complete a case with what needs the roofs and the other providers, and put it into the report."""
        for name, why in died.items():
            if case["task"] in PROVIDERS[name].tasks:
                case["providers"][name] = {"work": PROVIDERS[name].work, "error": why}
        if roofs := self.report.get("roofs"):
            for found in measured(case).values():
                figures = (found[key] for key in ("flops", "bytes", "seconds"))
                found["share_of_roof"] = share(*figures, case["dtype"], roofs)
        memory.add_ratios(case, EAGER)
        self.report["cases"].append(case)
        print(f"measured: {report_of.name(case)}", file=sys.stderr, flush=True)
        self.save()
        return case

    def measure_memory(self, shape: Shape, names: list[str], cases: list[dict]):
        def of_provider(name: str):
            tasks = {case["task"]: case for case in cases if name in measured(case)}
            try:
                for event in self.part("memory", shape=shape._asdict(), tasks=list(tasks), name=name) if tasks else ():
                    tasks[event["task"]]["providers"][name]["peak_extra_mib"] = event["peak_extra_mib"]
            except Died as error:
                self.report["not_run"].append(f"memory of {name}, {shape}: {error}")

        with ThreadPoolExecutor(MEMORY_PROCESSES) as pool:
            list(pool.map(of_provider, dict.fromkeys([EAGER, *names])))
        for case in cases:
            memory.add_ratios(case, EAGER)

    def part(self, kind: str, **request):
        if kind != "roofs":
            request["settings"] = self.settings._asdict()
        silence = SILENCE[self.settings.device]
        return events("bench.parts", {"kind": kind, **request}, ends=self.ends, silence=silence)

    def save(self):
        self.report["seconds"] = time.monotonic() - self.start
        report_of.save(self.report, self.path)


if __name__ == "__main__":
    sys.exit(main())
