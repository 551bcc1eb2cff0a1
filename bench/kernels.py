"""The policy loss fused with the head, against eager PyTorch and its alternatives: time, memory, accuracy.

    python -m bench.kernels --quick [--out FOLDER]      two CPU cores, under 5 minutes
    python -m bench.kernels --full [--out FOLDER]       a GPU: the heads of Qwen2.5-VL 3B and 7B, stops after 8.5 minutes
    python -m bench.kernels --model llama-3.1-8b qwen3-vl-8b --n 4096 --rows peaked flat --task loss frozen
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
own, so that a crash or a hang affects one provider only; --out has kernels.json after every case. The memory and time that
it will take are printed first; a shape that does not fit into memory is not run.
Exit code: 1 if one of ours failed, else 0.

The head of --quick is far narrower than a model's: passes over the logits weigh more, and chunks of few rows make products
slower. Its time ratios are not those of a model's head.
"""

import argparse
import itertools
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mssr.cli import run_command

from . import arguments as options
from . import estimate, inputs, machine, room, tables
from . import report as report_of
from .child import Died, OutOfTime, events
from .jobs import TASKS, Settings
from .providers import PROVIDERS
from .report import EAGER, measured
from .roofs import share
from .room import Need, say
from .shapes import MODELS, Shape

# Seconds without news until a provider counts as hanging: the first run compiles, and some packages try out dozens of
# configurations.
SILENCE = {"cpu": 600, "cuda": 120}
PROGRESS = 20  # seconds between lines that say what runs
MEMORY_PROCESSES = 2  # at most, in parallel; they do not affect each other's figures

DEFAULTS = dict(n=[2048], d=1024, v=65536, repeats=20, workspace_mib=256, providers=list(PROVIDERS))
# The workspace is smaller than the logits, as it is at a model's head.
QUICK = dict(n=[512], d=256, v=16384, repeats=32, workspace_mib=8)
# The most important first, in case the time runs out.
FULL = dict(model=["qwen2.5-vl-7b", "qwen2.5-vl-3b"], n=[8192, 2048, 32768], minutes=8.5)


def main(words: list[str] | None = None) -> int:
    arguments = parse_arguments(words)
    settings = Settings(**{key: getattr(arguments, key) for key in Settings._fields if key != "input_sets"})
    report = report_of.new("bench.kernels", words, arguments.device, settings._asdict())
    path = report_of.file_at(arguments.out, report_of.KERNELS)
    report_of.refuse_other_file(path)
    ends = time.monotonic() + 60 * arguments.minutes if arguments.minutes else math.inf
    run = Run(report, path, settings, ends)
    shapes = run.fitting(shapes_of(arguments))
    try:
        run.roofs(arguments.dtype)
        run.say_how_long(shapes, arguments.task, arguments.providers)
        for shape in shapes:
            run.measure(shape, arguments.task, arguments.providers)
    except Died as error:
        sys.exit(f"bench.kernels: a plain product on {arguments.device} was not measured: {error}")
    except KeyboardInterrupt:
        report["not_run"].append("the rest: interrupted")
        run.save()
    report_of.show(tables.kernels(report))
    return int(any(report_of.is_ours(name) for case in report["cases"] for name in report_of.failures(case)))


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = options.parser(
        __doc__,
        epilog="Several values of an option make several cases. Without a shape: --full on a GPU, else --quick.",
    )
    preset = parser.add_mutually_exclusive_group()
    preset.add_argument("--quick", action="store_true", help="a small shape, for two CPU cores")
    preset.add_argument("--full", action="store_true", help="Qwen2.5-VL 3B and 7B at N 2048, 8192 and 32768, for a GPU")
    parser.add_argument("--model", nargs="+", choices=sorted(MODELS), help="heads by name (D and V)")
    parser.add_argument("--n", nargs="+", type=options.positive, help="tokens (default 2048)")
    parser.add_argument("--d", type=options.positive, help="hidden size, without --model (default 1024)")
    parser.add_argument("--v", type=options.positive, help="vocabulary, without --model (default 65536)")
    options.add_dtype(parser, "float32", "bfloat16", "float16", nargs="+")
    parser.add_argument(
        "--rows", nargs="+", choices=sorted(inputs.KINDS), default=["realistic"], help="default realistic"
    )
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS), help="what to measure (default all)")
    options.add_device(parser)
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, metavar="NAME", help="only these, and eager")
    parser.add_argument(
        "--workspace-mib", type=options.positive, help="limit, also for peers (default 256, --quick: 8)"
    )
    parser.add_argument("--vocab-drop-tol", type=float, default=2.0**-8, help="tolerance of `sparse` (default 2^-8)")
    parser.add_argument("--repeats", type=options.positive, help="repetitions (default 20, with --quick 32)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs (default 0)")
    parser.add_argument("--minutes", type=float, help="time limit; skipped cases are listed (default 8.5 with --full)")
    parser.add_argument("--out", type=Path, metavar="WHERE", help="folder for kernels.json, or a FILE.json")
    given = parser.parse_args(words)
    if given.model and (given.d or given.v):
        parser.error("--model sets D and V: remove --d and --v")
    has_shape = any((given.model, given.n, given.d, given.v))
    if has_shape and (given.quick or given.full):
        parser.error("--quick and --full have their own shapes: remove --model, --n, --d and --v")
    full = given.full or (given.device == "cuda" and not given.quick)
    parser.set_defaults(**DEFAULTS | ({} if has_shape else FULL if full else QUICK))
    parser.set_defaults(dtype=[options.default_dtype(given.device)])
    return parser.parse_args(words)


def shapes_of(arguments: argparse.Namespace) -> list[Shape]:
    heads = {name: MODELS[name] for name in arguments.model or ()} or {None: (arguments.d, arguments.v)}
    cases = itertools.product(arguments.n, arguments.dtype, arguments.rows, heads.items())
    return [Shape(model, n, *head, dtype, rows) for n, dtype, rows, (model, head) in cases]


class Run:
    """Fills a report shape by shape; saves it after every case."""

    def __init__(self, report: dict, path: Path | None, settings: Settings, ends: float = math.inf):
        """report: of `bench.report.new`. ends: time limit, by time.monotonic()."""
        self.report, self.path, self.settings, self.ends = report, path, settings, ends
        self._began, self._said = time.monotonic(), -math.inf

    def fitting(self, shapes: list[Shape]) -> list[Shape]:
        """Return the shapes that fit into memory; the others are listed as not run. Exits with 2 if none fits."""
        needs = {shape: self.need(shape) for shape in shapes}
        fit, why_not = room.fitting(needs, self.settings.device, "shape")
        self.report["not_run"] += why_not.values()
        return fit

    def need(self, shape: Shape) -> Need:
        def way_out(have: int) -> str:
            n = estimate.most_tokens(shape, self.settings, have)
            return f"--n {n} would fit" if n else "no number of tokens would fit"

        return Need(report_of.size(shape._asdict()), estimate.peak_bytes(shape, self.settings), way_out)

    def say_how_long(self, shapes: list[Shape], tasks: list[str], names: list[str]):
        """By the roofs, which must be measured."""
        names, roofs = list(dict.fromkeys([EAGER, *names])), self.report["roofs"]
        found = sum(estimate.seconds(shape, tasks, names, self.settings, roofs) for shape in shapes)
        limit = "" if math.isinf(self.ends) else f"; it ends after {(self.ends - time.monotonic()) / 60:.1f} minutes"
        say(f"about {max(1, round(found / 60))} min, and what compiling takes{limit}")

    def roofs(self, dtypes: list[str]):
        """Raises:
        Died: a plain product could not be measured.
        """
        (found,) = self.part("roofs", dtypes=dtypes)
        self.report |= found
        self.save()

    def measure(self, shape: Shape, tasks: list[str], names: list[str]):
        """Add the cases to the report. names: the providers; eager is always measured, first."""
        found: list[dict] = []
        died: dict[str, str] = {}
        while left := tasks[len(found) :]:
            running = ""
            here = [name for name in PROVIDERS if name not in died and (name in names or name == EAGER)]
            try:
                for event in self.part("cases", shape=shape._asdict(), tasks=left, names=here):
                    running = event.get("running", "")
                    self.show_progress(running)
                    if "case" in event:
                        found.append(self.add(event["case"], died))
            except Died as error:
                if isinstance(error, OutOfTime) or not running:
                    cases = [shape._asdict() | {"task": task} for task in left]
                    self.report["not_run"] += [f"{report_of.name(case)}: {error}" for case in cases]
                    break
                died[running] = f"took its process down: {error}"
        if self.settings.device == "cpu":
            self.measure_memory(shape, names, found)
            self.save()

    def show_progress(self, running: str):
        now = time.monotonic()
        if running and now - self._said >= PROGRESS:
            self._said = now
            say(f"after {(now - self._began) / 60:.1f} min: {running}")

    def add(self, case: dict, died: dict[str, str]) -> dict:
        """Add the shares of roof and the providers that died to a case, and put it into the report."""
        for name, why in died.items():
            if case["task"] in PROVIDERS[name].tasks:
                case["providers"][name] = {"work": PROVIDERS[name].work, "error": why}
        if roofs := self.report.get("roofs"):
            for found in measured(case).values():
                figures = (found[key] for key in ("flops", "bytes", "seconds"))
                found["share_of_roof"] = share(*figures, case["dtype"], roofs)
        self.report["cases"].append(case)
        say(f"measured: {report_of.name(case)}")
        self.save()
        return case

    def measure_memory(self, shape: Shape, names: list[str], cases: list[dict]):
        def of_provider(name: str):
            tasks = {case["task"]: case for case in cases if name in measured(case)}
            try:
                for event in self.part("memory", shape=shape._asdict(), tasks=list(tasks), name=name) if tasks else ():
                    tasks[event["task"]]["providers"][name]["peak_extra_mib"] = event["peak_extra_mib"]
            except Died as error:
                self.report["not_run"].append(f"memory of {name}, N {shape.n}, V {shape.v}: {error}")

        say("memory: a process per provider")
        fitting = machine.free_bytes("cpu") // estimate.memory_process_bytes(shape)
        with ThreadPoolExecutor(max(1, min(MEMORY_PROCESSES, fitting))) as pool:
            list(pool.map(of_provider, dict.fromkeys([EAGER, *names])))

    def part(self, kind: str, **request):
        request |= {"kind": kind, "settings": self.settings._asdict()}
        return events("bench.parts", request, ends=self.ends, silence=SILENCE[self.settings.device])

    def save(self):
        report_of.save(self.report, self.path)


if __name__ == "__main__":
    run_command(lambda: sys.exit(main()))
