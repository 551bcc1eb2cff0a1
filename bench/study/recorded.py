"""What a study reads from a run's metrics.jsonl."""

from typing import Literal

ACCURACY = "val/accuracy"

SERIES = (
    ACCURACY,
    "train/reward",
    "policy/entropy",
    "policy/entropy_proxy",
    "train/grad_norm",
    "policy/clip_fraction",
    "tracker/brier",
    "rollout/response_tokens",
)
BINS = "tracker/bins"  # 10 of [count, sum of predicted values, sum of observed rewards], by predicted value

# What a run has spent so far, by its name in train.budget and in a study's `match`.
Match = Literal["updates", "rollouts", "tokens", "seconds"]
COSTS = {
    "updates": "cost/updates",
    "rollouts": "cost/rollouts",
    "tokens": "cost/response_tokens",
    "seconds": "cost/seconds",
}
