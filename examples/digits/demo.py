"""`make demo`: trains a tiny vision-language model to read handwritten digits by RL, starting from random weights.

    digits -> a tiny random Qwen2.5-VL -> warm start (`mssr sft`) -> RL (`mssr train`)

The warm start (`examples.digits.start`) and RL run the commands `mssr sft` and `mssr train`, on a CPU with one rank per core
(at most two, since the model is small).
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import mssr.extras  # noqa: F401  first: it says in one line which library is missing  # isort: skip
import torch

from examples.digits.start import warm_start, write_problems
from examples.tiny.start import launch
from mssr.cli import run_command  # also sets environment variables for the commands
from mssr.config.paths import path_for
from mssr.errors import UserError
from mssr.folder_lock import locked
from mssr.outputs import set_aside
from mssr.training.summary import SUMMARY, write_summary

CONFIG = Path("configs/tiny.yaml")
MARKER = "made_by_demo.txt"


def demo(seed: int, run_dir: Path, overrides: Sequence[str] = ()) -> dict:
    """Run all steps in `run_dir`, setting an earlier demo aside; add the times to the summary of `mssr train` and return it.

    overrides: `key=value`, for both the warm start and RL.
    """
    started = time.monotonic()
    set_earlier_demo_aside(run_dir)

    print("1/3  digits: pairs of 1,797 real scans from scikit-learn, with a question about each pair", flush=True)
    files = write_problems(run_dir, seed)
    ranks = 1 if torch.cuda.is_available() else min(2, len(os.sched_getaffinity(0)))

    print(
        "2/3  warm start: a tiny random Qwen2.5-VL learns to answer until about half of its answers are right",
        flush=True,
    )
    model = warm_start(run_dir, CONFIG, files, seed, overrides, ranks=ranks)

    print("3/3  RL with one rollout per prompt (MSSR)", flush=True)
    data = [f"seed={seed}", f"data.train={files['train']}", f"data.val={files['val']}"]
    rl = [*data, *overrides, f"model.path={model}", f"run_dir={run_dir}"]
    training = time.monotonic()
    launch("train", CONFIG, rl, ranks=ranks)
    ended = time.monotonic()

    summary = json.loads((run_dir / SUMMARY).read_text())
    summary |= {"train_seconds": round(ended - training, 1), "total_seconds": round(ended - started, 1)}
    write_summary(run_dir, summary)
    return summary


def set_earlier_demo_aside(run_dir: Path) -> None:
    """Rename the folder of an earlier demo, which may hold what a person added, to the first free `run_dir.N`.

    Raises:
        UserError: the folder holds other files, or the earlier demo still runs.
    """
    if run_dir.exists() and any(run_dir.iterdir()):
        if not (run_dir / MARKER).is_file():
            raise UserError(
                f"{run_dir} exists and is not from a demo; choose another folder with RUN_DIR=... (or --run-dir)"
            )
        with locked(run_dir), locked(run_dir / "sft"):
            pass
        print(f"the earlier demo is in {set_aside(run_dir)} now", flush=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / MARKER).write_text("`make demo` wrote this folder. Its next run renames it and keeps it.\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=path_for("--run-dir"), default=Path("runs/demo"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="override keys of configs/tiny.yaml")
    arguments = parser.parse_args()
    summary = demo(arguments.seed, arguments.run_dir, arguments.overrides)
    print(f"{summary['train_seconds']:.0f} s of RL, {summary['total_seconds']:.0f} s in all")


if __name__ == "__main__":
    run_command(main)
