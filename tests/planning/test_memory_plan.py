"""Predicted memory, compared with real training in separate processes; the prediction is not fitted to any case."""

import pytest
from memory_probe import Case, chosen_prompts, measure, wide_model
from policy_helpers import random_batch
from transformers import AutoConfig

from mssr.config import Config, validate_config
from mssr.planning.memory import Machine, Memory, MemoryPlanner
from mssr.planning.trace import MicroBatchShape
from mssr.policy.packing import plan_micro_batches

TRAINING = ("scoring", "forward_backward", "optimizer")
CASES = {
    "weights and gradients are the most": Case("", [60] * 6, 300, train={"zero_stage": 0}),
    "activations are the most": Case("", [700] * 3, 2400, train={"zero_stage": 0}),
    "gradient checkpointing": Case(
        "", [700] * 3, 2400, train={"zero_stage": 0}, model={"gradient_checkpointing": True}
    ),
    "with a reference": Case("", [60] * 3, 300, reference=True, train={"zero_stage": 0}),
    "ZeRO-2": Case("", [60] * 6, 300, train={"zero_stage": 2}),
    "LoRA": Case("", [700] * 3, 2400, train={"zero_stage": 2}, model={"lora": {"rank": 16}}),
    "ZeRO-3 on two ranks": Case("", [60] * 4, 180, train={"zero_stage": 3}, ranks=2),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return wide_model(tmp_path_factory.mktemp("wide"))


def configured(case: Case, path: str) -> Config:
    return validate_config({
        "run_dir": "unused", "data": {"train": "unused"}, "rollout": {"engine": "hf"},
        "model": {"path": path, "dtype": "float32"} | case.model,
        "algorithm": {"kl_coef": 0.01 if case.reference else 0.0},
        "train": {"micro_batch_tokens": case.budget} | case.train,
    })  # fmt: skip


def predicted(case: Case, path: str) -> list[Memory]:
    """Return the prediction for each micro-batch that the engine will make."""
    batch = random_batch(chosen_prompts(len(case.responses)), case.responses)
    lengths = [len(prompt.token_ids) + length for prompt, length in zip(batch.prompts, case.responses)]
    groups = plan_micro_batches(lengths, case.budget)
    planner = MemoryPlanner(AutoConfig.from_pretrained(path), Machine(case.ranks))
    memories = []
    for rows in groups:
        grids = [batch.prompts[row].image_grid_thw for row in rows if batch.prompts[row].image_grid_thw is not None]
        shape = MicroBatchShape(
            tuple(lengths[row] for row in rows),
            sum(case.responses[row] for row in rows),
            tuple(tuple(grid) for image in grids for grid in image.tolist()),
        )
        memories.append(planner.predict(configured(case, path), shape, micro_batches=len(groups)))
    return memories


QUICKEST = "with a reference"
OTHERS = pytest.mark.slow("10 to 19 s each: real training in a process whose memory is measured")


@pytest.mark.parametrize("name", [QUICKEST, *(pytest.param(name, marks=OTHERS) for name in CASES if name != QUICKEST)])
def test_prediction_is_within_15_percent_of_what_training_takes(name, path):
    case = CASES[name]
    expected = max(memory.total(phase) for memory in predicted(case, path) for phase in TRAINING)
    measured = measure(Case(**case.__dict__ | {"path": path}))
    print(f"\n{name}: predicted {expected / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB")
    assert expected == pytest.approx(measured, rel=0.15)
