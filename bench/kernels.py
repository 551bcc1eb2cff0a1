"""The policy loss fused with the head against eager PyTorch and what else does the job: time, memory, accuracy.

    python -m bench.kernels --quick [--out FOLDER]      two CPU cores, under 5 minutes
    python -m bench.kernels --full [--out FOLDER]       a GPU: the heads of Qwen2.5-VL 3B and 7B, stops after 8.5 minutes
    python -m bench.kernels --model llama-3.1-8b gemma-2-9b --n 4096 --rows peaked flat --task loss frozen
    python -m bench.kernels --n 2048 --d 1024 --v 65536

Time: the providers take turns on the same inputs, and a ratio is the median of the ratios to eager within a turn. On a CPU
freed memory stays with the process, and a run from which the host took the processors is made again (`bench.steal`). Memory:
the peak beyond what the inputs take, gradients included; from the allocator on CUDA, of a process for each provider on the
CPU. Errors: against float64 of the same inputs. Share of roof: the time that the job's products or its memory traffic take at
the rates measured in the same run, over the time that it took; above 100 % where caches served what is counted as traffic,
or the machine was slower when its roofs were measured. A provider that fails is listed with its error.

Tasks: "loss" is forward and backward with all gradients, "frozen" without the head's, "forward" log-probs and entropy without
gradients, or the loss from those that hand out nothing else. Every shape is measured in a process of its own, so that a
provider which takes it down or does not come back costs itself and no other; --out has kernels.json after every case.

--quick has a head far narrower than a model's: passes over the logits weigh more in it, and chunks of few rows make products
slower. Its time ratios are not those of a model's head.
"""

import argparse
import datetime
import itertools
import json
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from . import inputs, memory, shapes
from .jobs import TASKS, Settings
from .processes import Died, OutOfTime, events
from .providers import EAGER, PROVIDERS
from .reports import KERNELS
from .roofs import share
from .shapes import MODELS, Shape

# The first run compiles, and some packages try out dozens of configurations: seconds until it counts as not done.
SILENCE = {"cpu": 600, "cuda": 120}
REFERENCE = "mssr reference"  # at the heads of large models its float32 products take longer than all others together
SLOW = "torch linear CE chunked"  # on a CPU a fifth of the time of --quick
MEMORY_PROCESSES = 2  # at one time; they do not disturb each other's figures


def main(words: list[str] | None = None):
    arguments = parse_arguments(words)
    run = Run(arguments)
    try:
        run.everything()
    except KeyboardInterrupt:
        run.report["not_run"].append("what was left, by interruption")
        run.save()
    from .tables import show

    show(run.report)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="Several of a kind make several cases. Without a shape: --full where there is a GPU, else --quick.",
    )
    preset = parser.add_mutually_exclusive_group()
    preset.add_argument("--quick", action="store_true", help="a small shape, for two CPU cores")
    preset.add_argument("--full", action="store_true", help="Qwen2.5-VL 3B and 7B at N 2048, 8192 and 32768, for a GPU")
    parser.add_argument("--model", nargs="+", choices=sorted(MODELS), help="heads by name (D, V and softcap)")
    parser.add_argument("--n", nargs="+", type=positive, help="tokens (default 2048)")
    parser.add_argument("--d", type=positive, help="hidden size, where there is no --model (default 1024)")
    parser.add_argument("--v", type=positive, help="vocabulary, likewise (default 65536)")
    parser.add_argument("--softcap", type=float, help="likewise (default none)")
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), help="default float32 on CPU, else bfloat16"
    )
    parser.add_argument("--rows", nargs="+", choices=sorted(inputs.KINDS), default=["realistic"])
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, metavar="NAME", help="those only; eager always")
    parser.add_argument(
        "--workspace-mib", type=positive, help="of ours and, at most, of peers' chunks (default 256, with --quick 8)"
    )
    parser.add_argument("--vocab-drop-tol", type=float, default=2.0**-8, help="of mode sparse")
    parser.add_argument("--repeats", type=positive, help="turns (default 20, with --quick 32)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--minutes", type=float, help="stop after them, and say what was not run (default 8.5 with --full)"
    )
    parser.add_argument("--out", type=Path, metavar="WHERE", help="write kernels.json there, or FILE.json")
    arguments = parser.parse_args(words)
    given = (arguments.model, arguments.n, arguments.d, arguments.v)
    if (arguments.quick or arguments.full) and any(given):
        parser.error("--quick and --full have shapes of their own: drop --model, --n, --d and --v")
    if not any(given):
        arguments.full = arguments.full or (arguments.device == "cuda" and not arguments.quick)
        arguments.quick = not arguments.full
    arguments.dtype = arguments.dtype or ["float32" if arguments.device == "cpu" else "bfloat16"]
    if arguments.quick:
        arguments.n, arguments.d, arguments.v = [512], 256, 16384
    if arguments.full:
        # The most telling first, in case that the time is up.
        arguments.model, arguments.n = ["qwen2.5-vl-7b", "qwen2.5-vl-3b"], [8192, 2048, 32768]
        arguments.minutes = arguments.minutes or 8.5
    if arguments.model and (arguments.d or arguments.v or arguments.softcap):
        parser.error("a model's head has D, V and softcap: drop --d, --v and --softcap")
    # With --quick smaller than the logits, as it is with a real head.
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
    """The report, and what fills it, shape by shape."""

    def __init__(self, arguments: argparse.Namespace):
        self.start = time.monotonic()
        self.ends = self.start + 60 * arguments.minutes if arguments.minutes else float("inf")
        self.shapes, self.tasks = shapes_of(arguments), arguments.task
        self.names = [name for name in PROVIDERS if name in arguments.providers or name == EAGER]
        self.settings = Settings(
            arguments.device, arguments.repeats, arguments.seed, arguments.workspace_mib, arguments.vocab_drop_tol
        )
        self.path = arguments.out and (arguments.out if arguments.out.suffix == ".json" else arguments.out / KERNELS)
        self.dtypes = arguments.dtype
        self.report = {
            "command": shlex.join(["python", "-m", "bench.kernels", *sys.argv[1:]]),
            "date": datetime.date.today().isoformat(),
            "seconds": 0.0,
            "machine": {},
            "settings": self.settings._asdict(),
            "roofs": {},
            "cases": [],
            "not_run": [f"{SLOW}: left out of --quick"] if arguments.quick and SLOW not in self.names else [],
        }

    def everything(self):
        try:
            (found,) = self.part("roofs", {"device": self.settings.device, "dtypes": self.dtypes})
        except Died as error:
            sys.exit(f"bench.kernels: a plain product on {self.settings.device} was not measured: {error}")
        self.report |= found
        self.save()
        for shape in self.shapes:
            self.measure(shape)

    def measure(self, shape: Shape):
        first = len(self.report["cases"])
        died: dict[str, str] = {}
        while left := self.tasks[len(self.report["cases"]) - first :]:
            running = ""
            names = [name for name in self.names if name not in died]
            request = {"shape": shape._asdict(), "tasks": left, "names": names}
            try:
                for event in self.part("cases", request | {"settings": self.settings._asdict()}):
                    running = event.get("running", "")
                    if "case" in event:
                        self.add(event["case"], died)
            except Died as error:
                if isinstance(error, OutOfTime) or not running:
                    self.report["not_run"] += [f"{shape} {task}: {error}" for task in left]
                    break
                died[running] = f"took its process down: {error}"
        if self.settings.device == "cpu":
            self.measure_memory(shape, self.report["cases"][first:])
        self.save()

    def add(self, case: dict, died: dict[str, str]):
        """A finished case, with what needs the roofs and the other providers."""
        for name, why in died.items():
            if case["task"] in PROVIDERS[name].tasks:
                case["providers"][name] = {"work": PROVIDERS[name].work, "error": why}
        for found in case["providers"].values():
            if "seconds" in found:
                figures = (found[key] for key in ("flops", "bytes", "seconds"))
                found["share_of_roof"] = share(*figures, case["dtype"], self.report["roofs"])
        memory.add_ratios(case, EAGER)
        self.report["cases"].append(case)
        print(
            f"{case['task']}: {', '.join(f'{key} {case[key]}' for key in ('model', 'n', 'd', 'v', 'rows'))} done",
            flush=True,
        )
        self.save()

    def measure_memory(self, shape: Shape, cases: list[dict]):
        def of_provider(name: str):
            tasks = {case["task"]: case for case in cases if "seconds" in case["providers"].get(name, {})}
            request = {
                "shape": shape._asdict(),
                "tasks": list(tasks),
                "name": name,
                "settings": self.settings._asdict(),
            }
            try:
                for event in self.part("memory", request) if tasks else ():
                    tasks[event["task"]]["providers"][name]["peak_extra_mib"] = event["peak_extra_mib"]
            except Died as error:
                self.report["not_run"].append(f"memory of {name}, {shape}: {error}")

        with ThreadPoolExecutor(MEMORY_PROCESSES) as pool:
            list(pool.map(of_provider, self.names))
        for case in cases:
            memory.add_ratios(case, EAGER)

    def part(self, kind: str, request: dict):
        silence = SILENCE[self.settings.device]
        return events("bench.kernel_parts", kind, request, self.ends, silence)

    def save(self):
        self.report["seconds"] = time.monotonic() - self.start
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.report, indent=2) + "\n")


if __name__ == "__main__":
    main()
