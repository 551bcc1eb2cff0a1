"""Read the files that a run leaves, and save checkpoints without a model."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from mssr.observe.metrics import read_metrics


class RunFolder:
    """Folder of a finished (or interrupted) run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def override(self) -> str:
        return f"run_dir={self.path}"

    @property
    def metrics(self) -> list[dict[str, float]]:
        """Lines of metrics.jsonl without the values that differ between identical runs: times and memory."""
        lines = read_metrics(self.path / "metrics.jsonl")
        return [
            {
                key: value
                for key, value in line.items()
                if key not in ("time", "cost/seconds") and not key.startswith(("perf/", "memory/"))
            }
            for line in lines
        ]

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.path / "checkpoints").iterdir())

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / "model" / "model.safetensors")

    def rollouts(self, step: int) -> list[dict]:
        text = (self.path / "rollouts" / f"step_{step:06d}" / "rollouts.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def assert_same_as(self, other: "RunFolder") -> None:
        """Check that every metric of every step and every bit of the final weights are equal."""
        assert len(self.metrics) == len(other.metrics)
        for mine, theirs in zip(self.metrics, other.metrics):
            assert mine == theirs
        assert self.weights.keys() == other.weights.keys()
        for name, weight in other.weights.items():
            assert torch.equal(self.weights[name], weight), name


class EmptyEngine:
    """The parts of a policy engine that a checkpoint asks for."""

    class policy:
        parameters = staticmethod(list)

    own_state = state_dict = dict
