"""What a run reached, what it cost, and where everything is: `run_dir/summary.json`, and the last lines on the terminal."""

import importlib.metadata
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import mssr
from mssr.config import Config
from mssr.config.resolve import device_type, engine_name
from mssr.observe.metrics import FILE_NAME
from mssr.observe.rollouts import FOLDER as ROLLOUTS
from mssr.observe.trackers.trackers import HERE as TENSORBOARD
from mssr.outputs import replace
from mssr.training.checkpoint import FOLDER, saved_steps
from mssr.training.run import CURVES
from mssr.versions import vllm_version

SUMMARY, CARD = "summary.json", "README.md"
MEMORY = "memory/"
IN_CURVES = ("curves", TENSORBOARD)  # places that share a line on the terminal
FOR_PROGRAMS = ("metrics", "checkpoint", "best_checkpoint")  # places that have none
LIBRARIES = ("torch", "transformers", "deepspeed", "peft")


@dataclass(frozen=True)
class Summary:
    """The keys of summary.json, of the whole run, however often it was resumed. None (null): not measured.

    base_model: the initial one. steps: done. skipped_steps: of these, with updates left out.
    val_accuracy_before, val_accuracy_after: of the validation before the first step, and of the last one.
    val_accuracy_best, best_step: of the best validation, the earliest of several; step 0 is the initial model.
    cost: updates, rollouts, response_tokens, seconds; all but validation.
    logp_gap: mean and max of the difference between the sampler's log-probs and the trainer's, in nats.
    peak_memory_gib: of the rank that used most; on a CPU resident memory.
    command: that started the run, or went on with it. versions: of the libraries. ranks: number of processes.
    places: path of each output that is there, by name: metrics, curves, rollouts (the newest page), checkpoint (the
        newest), best_checkpoint, model, adapter, card, summary, tensorboard; of other trackers, what they say of theirs.
    """

    base_model: str
    algorithm: str
    seed: int
    steps: int
    skipped_steps: int
    val_accuracy_before: float | None
    val_accuracy_after: float | None
    val_accuracy_best: float | None
    best_step: int | None
    cost: dict[str, float]
    logp_gap: dict[str, float | None]
    peak_memory_gib: float | None
    rollout_engine: str | None = None
    ranks: int | None = None
    command: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the lines for the terminal."""
        cost = self.cost
        spent = [
            f"{self.steps:,} steps",
            *(f"{cost[name]:,} {name}" for name in ("updates", "rollouts") if name in cost),
        ]
        if "response_tokens" in cost:
            spent.append(f"{cost['response_tokens']:,} tokens")
        if "seconds" in cost:
            spent.append(f"{timedelta(seconds=round(cost['seconds']))} of training")
        if self.peak_memory_gib is not None:
            spent.append(f"at most {self.peak_memory_gib:.1f} GiB per rank")
        return "\n".join([*self._accuracy(), f"cost       {', '.join(spent)}", *place_lines(self.places)])

    def _accuracy(self) -> list[str]:
        before, after, best = self.val_accuracy_before, self.val_accuracy_after, self.val_accuracy_best
        if before is None or after is None:
            return []
        gain = f"{100 * (after - before):+.1f} points"
        return [
            f"validation accuracy {before:.1%} before RL, {after:.1%} after ({gain}); best {best:.1%}, step {self.best_step}"
        ]


def summarise(config: Config, records: Sequence[dict[str, Any]]) -> Summary:
    """Return what the metrics of a run say. records: lines of metrics.jsonl, null as NaN."""
    validations = {line["step"]: line["val/accuracy"] for line in records if "val/accuracy" in line}
    last = max(validations, default=0)
    best = max(validations, key=lambda step: (validations[step], -step), default=None)
    costs = {
        key.removeprefix("cost/"): value for line in records for key, value in line.items() if key.startswith("cost/")
    }
    memory = [value for line in records for key, value in line.items() if key.startswith(MEMORY)]
    gaps = {name: _finite(records, f"rollout/logp_gap_{name}") for name in ("mean", "max")}
    return Summary(
        base_model=config.model.path,
        algorithm=config.algorithm.name,
        seed=config.seed,
        steps=records[-1]["step"] if records else 0,
        skipped_steps=int(max((line.get("train/skipped_steps", 0) for line in records), default=0)),
        val_accuracy_before=validations.get(0),
        val_accuracy_after=validations[last] if last else None,
        val_accuracy_best=None if best is None else validations[best],
        best_step=best,
        cost={name: round(value, 1) if name == "seconds" else int(value) for name, value in costs.items()},
        logp_gap={
            "mean": sum(gaps["mean"]) / len(gaps["mean"]) if gaps["mean"] else None,
            "max": max(gaps["max"], default=None),
        },
        peak_memory_gib=round(max(memory), 3) if memory else None,
    )


def this_process(config: Config, ranks: int) -> dict[str, Any]:
    """Return the fields of a Summary that only the process that trains knows."""
    engine = engine_name(config.rollout.engine, device_type(config.device))
    return {"rollout_engine": engine, "ranks": ranks, "command": command_line(), "versions": versions(engine)}


def command_line() -> str:
    """Return what to type to start this process again, without --resume."""
    program, *arguments = sys.argv
    path = Path(program)
    arguments = [argument for argument in arguments if argument != "--resume"]
    if path.name == "mssr" or path.parts[-2:] == ("mssr", "__main__.py"):
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
        nodes = ["--nnodes", str(ranks // local)] if local < ranks else []
        launched = ["python", "-m", "mssr.launch", *nodes, "--nproc-per-node", str(local), "-m"] if ranks > 1 else []
        return shlex.join([*launched, "mssr", *arguments])
    if path.suffix == ".py" and path.name != "ipykernel_launcher.py":
        return shlex.join(["python", os.path.relpath(path), *arguments])
    return "mssr.train(config), in Python"


def versions(engine: str) -> dict[str, str]:
    """Return the versions that a run's results may depend on. engine: the rollout engine."""
    found = {"mssr": mssr.__version__, "python": platform.python_version()}
    found |= {name: importlib.metadata.version(name) for name in LIBRARIES}
    return found | ({"vllm": vllm_version()} if engine == "vllm" else {})


def places(run_dir: Path, best_step: int | None = None) -> dict[str, str]:
    """Return the path of each output that is there. best_step: for best_checkpoint."""
    pages = sorted(run_dir.glob(f"{ROLLOUTS}/step_*/index.html"), key=lambda page: (len(page.parent.name), page))
    steps = saved_steps(run_dir / FOLDER)
    found = {
        "metrics": run_dir / FILE_NAME,
        "curves": run_dir / CURVES,
        "tensorboard": run_dir / TENSORBOARD,
        "rollouts": pages[-1] if pages else None,
        "checkpoint": _checkpoint(run_dir, steps[-1]) if steps else None,
        "best_checkpoint": _checkpoint(run_dir, best_step) if best_step in steps else None,
        "model": run_dir / "model",
        "adapter": run_dir / "adapter",
        "card": run_dir / CARD,
        "summary": run_dir / SUMMARY,
    }
    return {name: str(path) for name, path in found.items() if path is not None and path.exists()}


def place_lines(found: dict[str, str]) -> list[str]:
    """Return the lines on the outputs that people look at. found: as `places` returns them."""
    curves = [found[name] for name in IN_CURVES if name in found]
    lines = {"curves": ", ".join(curves)} if curves else {}
    if "rollouts" in found:
        lines["rollouts"] = f"{found['rollouts']}   (open it in a browser)"
    lines |= {name: place for name, place in found.items() if name not in ("rollouts", *IN_CURVES, *FOR_PROGRAMS)}
    return [f"{name:<10} {text}" for name, text in lines.items()]


def write_summary(run_dir: Path, values: dict[str, Any]) -> None:
    """Write summary.json; that of an earlier session of the run is replaced."""
    replace(run_dir, SUMMARY, lambda partial: partial.write_text(json.dumps(values, indent=2) + "\n"))


def _finite(records: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [line[key] for line in records if key in line and math.isfinite(line[key])]


def _checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step_{step:06d}"
