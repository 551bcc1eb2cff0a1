"""Finished runs with known numbers, as `mssr train` and the study's runner write them."""

import json
from pathlib import Path

from bench.study.claims import Claim
from bench.study.results import StudyResults, read_run

MACHINE = {"python": "3.12.0", "torch": "2.12.0", "device": "Abacus 1", "cores": "2"}


def write_run(folder: Path, accuracies, *, every=2, end="budget", rollouts_at_start=0, bins=None, **series) -> Path:
    """Write a run with validations at steps 0, every, 2 * every, ... A step: 4 updates, 16 rollouts, 100 tokens, 0.5 s.

    series: key (with __ for /) -> values of the steps from 1 on.
    """
    folder.mkdir(parents=True)
    lines = []
    for step in range(every * (len(accuracies) - 1) + 1):
        line = {
            "step": step,
            "time": 0.0,
            "cost/updates": 4.0 * step,
            "cost/rollouts": 16.0 * step + rollouts_at_start,
            "cost/response_tokens": 100.0 * step,
            "cost/seconds": 0.5 * step,
        }
        if step:
            line |= {key.replace("__", "/"): values[step - 1] for key, values in series.items()}
            line |= {"tracker/bins": bins} if bins else {}
        if step % every == 0:
            line["val/accuracy"] = accuracies[step // every]
        lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    finished = {"end": end, "line": "", "wall_seconds": 20.0, "cpu_seconds": 18.0, "machine": MACHINE}
    (folder / "finished.json").write_text(json.dumps(finished))
    return folder


def study_results(
    folder: Path, arms: dict[str, list[list[float]]], *, claims=(), thresholds=(), budget=16.0, ends=None, **more
) -> StudyResults:
    """Return results. arms: name -> validations of each seed. ends: (arm, seed) -> how it ended. more: for `write_run`."""
    runs = []
    for arm, seeds in arms.items():
        for seed, accuracies in enumerate(seeds):
            end = (ends or {}).get((arm, seed), "budget")
            run = write_run(folder / arm / str(seed), accuracies, end=end, **more)
            runs.append(read_run(run, arm, seed, "updates", budget, list(thresholds)))
    return StudyResults(
        name="toy",
        question="Which one learns?",
        intro="",
        match="updates",
        budget=budget,
        config="configs/toy.yaml",
        set={"train.optimizer.lr": 1e-4},
        arms={arm: {"algorithm.name": arm} for arm in arms},
        seeds=list(range(max(map(len, arms.values())))),
        thresholds=list(thresholds),
        claims=[Claim(**claim) for claim in claims],
        command="python -m bench.study run configs/toy_study.yaml",
        jobs=2,
        machines=[MACHINE],
        elapsed_seconds=4000.0,
        missing=[],
        runs=runs,
    )
