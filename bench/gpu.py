"""All GPU benchmarks: kernels at the heads of Qwen2.5-VL, updates of a 7B and a 3B, the weight sync of a 7B.

    python -m bench.gpu [--out FOLDER]      # default: a folder of bench/results; about 8 minutes

For one H200; or an H100 or A100 with 80 GB, where the updates of the 3B do not fit. `make gpu` runs tests/gpu first. Runs
`bench.kernels`, `bench.step` and `bench.sync`, each with a time limit, so that failures and hangs do not affect the others;
each leaves its report in FOLDER. Exit code: 1 if one failed, else 0; peers and vLLM may be missing.
"""

import datetime
import re
import subprocess
import sys
from pathlib import Path

import torch

from mssr.cli import run_command

from . import arguments
from .child import ROOT, Child, environment

LARGE, SMALL = "qwen2.5-vl-7b", "qwen2.5-vl-3b"
OURS = ["mssr exact", "mssr sparse", "mssr recompute", "mssr forward"]
# These may compile or try out configurations for long, or not run on this GPU at all.
SLOW = ["liger scaled CE", "trl", "verl", "verl torch", "cce", "cce exact", "cce torch_compile", "quack CE"]
QUICK = [*OURS, "torch.compile", "liger GRPO", "liger CE", "torch linear CE"]
TASKS = ["--task", "loss", "forward", "--n", "8192"]
# (report, seconds, module and arguments), the most important first.
PARTS = (
    ("kernels", 120, ["bench.kernels", "--model", LARGE, *TASKS, "--providers", *QUICK]),
    ("kernels_rows", 90, ["bench.kernels", "--model", LARGE, *TASKS, "--rows", "peaked", "flat", "--providers", *OURS]),
    ("sync", 90, ["bench.sync", "--model", "7b"]),
    ("step", 150, ["bench.step", "--size", "7b-lora", "--repeats", "3"]),
    ("step_3b", 90, ["bench.step", "--size", "3b", "--repeats", "3"]),
    ("kernels_3b", 90, ["bench.kernels", "--model", SMALL, *TASKS, "--providers", *QUICK]),
    ("kernels_peers", 150, ["bench.kernels", "--model", LARGE, *TASKS, "--providers", *SLOW]),
)


def main(words: list[str] | None = None) -> int:
    parser = arguments.parser(__doc__)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder for the reports")
    out = parser.parse_args(words).out
    if why := arguments.why_no_gpu():
        parser.error(why)
    folder = out or results_folder()
    ended = {name: run(command, folder / f"{name}.json", limit) for name, limit, command in PARTS}
    print(folder, *(f"{name}: {words}" for name, words in ended.items()), sep="\n")
    return int(any(words.startswith("failed") for words in ended.values()))


def results_folder() -> Path:
    machine = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return ROOT / f"bench/results/{machine}_{datetime.date.today().isoformat()}"


def run(command: list[str], file: Path, limit: float) -> str:
    """Run one benchmark, which writes `file`; return "measured" or "failed: ..."."""
    kernels = command[0] == "bench.kernels"
    options = ["--out", str(file), "--minutes", str(limit / 60)] if kernels else ["--json", str(file)]
    words = [sys.executable, "-m", *command, "--device", "cuda", *options]
    child = Child(words, cwd=ROOT, env=environment(TRITON_INTERPRET=0))
    try:
        code = child.process.wait(limit * 1.2)  # kernels end by themselves, after a case
    except subprocess.TimeoutExpired:
        return f"failed: took over {limit:.0f} s"
    finally:
        child.end()
    return f"failed: exit code {code}, see above" if code else "measured"


if __name__ == "__main__":
    run_command(lambda: sys.exit(main()))
