"""`make demo`: from nothing to a vision-language model that got better at reading handwritten digits by RL.

    digits -> a tiny random Qwen2.5-VL -> warm start (`mssr sft`) -> RL (`mssr train`) -> curves, summary

The warm start and RL are the commands `mssr sft` and `mssr train`, a rank a core on a CPU (two at most: the model is
small); only the tiny model (`mssr.policy.tiny`) is the demo's own.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from mssr.cli import run_command  # first: sets up the environment that torch reads
from mssr.config import Config, load_config
from mssr.data.files import open_rows
from mssr.data.tasks.digits import write_digits
from mssr.errors import UserError
from mssr.observe.metrics import read_metrics
from mssr.observe.plots import plot_curves
from mssr.policy.tiny import write_tiny_model
from mssr.rollout import engine_name

CONFIG = Path("configs/tiny.yaml")
PROBLEMS = {"train": 4096, "val": 512, "test": 512}
CORPUS_ROWS = 1000
MARKER = "made_by_demo.txt"


def demo(seed: int, run_dir: Path, overrides: Sequence[str] = ()) -> dict:
    """Runs everything into `run_dir` (an earlier demo there is replaced) and returns the summary.

    overrides: `key=value`, for both the warm start and RL.
    """
    started = time.monotonic()
    replace_earlier_demo(run_dir)

    print("1/4  digits: 1,797 real scans from scikit-learn, pairs of them as pictures with a question", flush=True)
    files = write_digits(run_dir / "data", seed=seed, **PROBLEMS)
    common = [f"seed={seed}", f"data.train={files['train']}", f"data.val={files['val']}", *overrides]

    print(
        "2/4  warm start: a tiny random Qwen2.5-VL imitates answers until it is right about half of the time",
        flush=True,
    )
    untrained = run_dir / "untrained"
    # Its few validations are over before vLLM has started.
    warm = ["rollout.engine=hf", *common, f"model.path={untrained}", f"run_dir={run_dir / 'sft'}"]
    write_tiny_model(untrained, corpus(files["train"], load_config(CONFIG, warm)), seed=seed)
    launch("sft", warm)

    print("3/4  RL with one rollout per prompt (MSSR)", flush=True)
    rl = [*common, f"model.path={run_dir / 'sft' / 'model'}", f"run_dir={run_dir}"]
    training = time.monotonic()
    launch("train", rl)
    train_seconds = time.monotonic() - training

    print("4/4  curves and summary", flush=True)
    curves = plot_curves({f"seed {seed}": run_dir / "metrics.jsonl"}, run_dir / "curves.png")
    summary = summarise(load_config(CONFIG, rl), train_seconds, time.monotonic() - started, curves)
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def launch(command: str, overrides: list[str]) -> None:
    """`mssr COMMAND configs/tiny.yaml ...`, on one GPU or on up to two cores."""
    ranks = 1 if torch.cuda.is_available() else min(2, len(os.sched_getaffinity(0)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run([*torchrun, "-m", "mssr", command, str(CONFIG), *overrides])
    if done.returncode:
        raise UserError(f"mssr {command} failed, see above")


def replace_earlier_demo(run_dir: Path) -> None:
    """Removes what an earlier demo left.

    Raises:
        UserError: the folder holds something else.
    """
    if run_dir.exists() and any(run_dir.iterdir()):
        if not (run_dir / MARKER).is_file():
            raise UserError(
                f"{run_dir} exists and is not a demo's; name another folder with RUN_DIR=... (or --run-dir)"
            )
        shutil.rmtree(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / MARKER).write_text("This folder was written by `make demo`, which replaces it on its next run.\n")


def corpus(train_file: Path, config: Config) -> list[str]:
    """What the tokenizer's merges are learned from: the training problems' texts and the fixed text around them."""
    rows = open_rows(str(train_file))
    fixed = ["user\n", "assistant\n", "\n" + config.data.instruction]
    texts = []
    for index in range(min(CORPUS_ROWS, len(rows))):
        row = rows[index]
        texts += [row["problem"].removeprefix("<image>"), row["solution"], *fixed]
    return texts


def summarise(config: Config, train_seconds: float, total_seconds: float, curves: Path) -> dict:
    records = read_metrics(config.run_dir / "metrics.jsonl")
    accuracy = [record["val/accuracy"] for record in records if "val/accuracy" in record]
    samples = sorted((config.run_dir / "rollouts").iterdir())
    return {
        "val_accuracy_before": accuracy[0],
        "val_accuracy_after": accuracy[-1],
        "train_seconds": round(train_seconds, 1),
        "total_seconds": round(total_seconds, 1),
        "seed": config.seed,
        "algorithm": config.algorithm.name,
        "rollout_engine": engine_name(config.rollout.engine),
        "steps": records[-1]["step"],
        "curves": str(curves),
        "metrics": str(config.run_dir / "metrics.jsonl"),
        "rollouts": str(samples[-1] / "index.html"),
        "checkpoint": str(sorted((config.run_dir / "checkpoints").iterdir())[-1]),
        "model": str(config.run_dir / "model"),
    }


def print_summary(summary: dict) -> None:
    before, after = summary["val_accuracy_before"], summary["val_accuracy_after"]
    print(
        f"\nvalidation accuracy {before:.1%} before RL, {after:.1%} after ({100 * (after - before):+.1f} points); "
        f"{summary['train_seconds']:.0f} s of RL, {summary['total_seconds']:.0f} s in all"
    )
    print(f"curves     {summary['curves']}")
    print(f"rollouts   {summary['rollouts']}   (open it in a browser)")
    print(f"model      {summary['model']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="override keys of configs/tiny.yaml")
    arguments = parser.parse_args()
    print_summary(demo(arguments.seed, arguments.run_dir, arguments.overrides))


if __name__ == "__main__":
    run_command(main)
