"""DeepSpeed with the shipped JSON files and with a user's: real engines equal plain transformers with torch's AdamW."""

import json
from pathlib import Path

import pytest
import torch
from policy_helpers import (
    ALONE,
    EagerTrainer,
    assert_same_weights,
    load_engine,
    make_engine,
    save_engine,
    whole_weights,
)
from test_engine_ranks import CONFIG, global_batches

from mssr.config.deepspeed_json import with_stage_of_json
from mssr.config.schema import ModelConfig, OptimizerConfig, TrainConfig
from mssr.errors import UserError
from mssr.policy.deepspeed_settings import deepspeed_settings
from mssr.policy.engine import PolicyEngine
from mssr.policy.loss import PolicyGradient

SHIPPED = Path(__file__).parents[2] / "configs" / "deepspeed"
ZERO2, ZERO3, OFFLOAD = (str(SHIPPED / f"{name}.json") for name in ("zero2", "zero3", "zero3_offload"))


@pytest.fixture
def written(tmp_path):
    def written(zero: dict, **sections) -> str:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({"zero_optimization": zero} | sections))
        return str(path)

    return written


def settings(path: str | None = None, dtype=torch.bfloat16, **train) -> dict:
    values = with_stage_of_json({"train": {"deepspeed": path} | train})["train"] if path else train
    return deepspeed_settings(OptimizerConfig(grad_clip=0.7), TrainConfig(**values), dtype)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_without_a_file_the_runs_keys_decide(stage):
    made = settings(zero_stage=stage, dtype=torch.float32)
    zero = {"stage": stage, "overlap_comm": False}
    assert made["zero_optimization"] == zero | ({"stage3_param_persistence_threshold": 4000} if stage == 3 else {})
    assert made["gradient_clipping"] == (0.7 if stage else 0.0) and made["bf16"] == {"enabled": False}


def test_the_files_own_settings_come_through(written):
    zero = {"stage": 3, "overlap_comm": True, "stage3_param_persistence_threshold": 10, "reduce_bucket_size": 1000}
    made = settings(written(zero, steps_per_print=5, wall_clock_breakdown=True))
    assert made["zero_optimization"] == zero
    assert (made["steps_per_print"], made["wall_clock_breakdown"]) == (5, True)
    assert made["bf16"] == {"enabled": True} and made["gradient_clipping"] == 0.7


def test_what_torchs_optimizer_needs_is_not_the_files_to_say(written):
    made = settings(written({"stage": 2}, zero_force_ds_cpu_optimizer=True, zero_allow_untested_optimizer=False))
    assert made["zero_allow_untested_optimizer"] and not made["zero_force_ds_cpu_optimizer"]


def test_a_key_that_deepspeed_does_not_know(written):
    with pytest.raises(UserError, match=r"ds\.json: zero_optimization\.reduce_bucket: Extra inputs"):
        settings(written({"stage": 2, "reduce_bucket": 5}))
    with pytest.raises(UserError, match=r"ds\.json: zero_optimization\.offload_optimizer\.pinned: Extra inputs"):
        settings(written({"stage": 2, "offload_optimizer": {"device": "cpu", "pinned": True}}))


def test_overlapping_needs_shared_gradients(written):
    with pytest.raises(UserError, match="overlap_comm needs stage 2 or 3"):
        settings(written({"stage": 1, "overlap_comm": True}))


def test_an_optimizer_that_checkpoints_cannot_read(written):
    accumulate = {"grad_accum_dtype": "fp32"}
    with pytest.raises(UserError, match="set stage 2 or 3"):
        settings(written({"stage": 1}, data_types=accumulate))
    assert settings(written({"stage": 2}, data_types=accumulate))["data_types"] == accumulate
    assert settings(written({"stage": 1}, data_types=accumulate), dtype=torch.float32)["data_types"] == accumulate


def engine_of(world, path: str, model: str) -> PolicyEngine:
    return PolicyEngine(
        ModelConfig(path=model, dtype="float32"),
        OptimizerConfig(lr=1e-4, grad_clip=1.0),
        TrainConfig(micro_batch_tokens=100, **with_stage_of_json({"train": {"deepspeed": path}})["train"]),
        world,
        temperature=1.0,
        total_updates=10,
    )


def train(world, path: str, model: str, batches):
    """Train on this rank's share of each batch. Return (weights, gradient norms)."""
    engine, norms = engine_of(world, path, model), []
    for batch in batches:
        share = len(batch) // world.size
        norms.append(
            engine.update(batch.rows(world.rank * share, (world.rank + 1) * share), PolicyGradient(CONFIG)).grad_norm
        )
    return whole_weights(engine), norms


@pytest.fixture(scope="module")
def oracle(model_dir, prompts, plain):
    batches = global_batches(prompts, plain)
    eager = EagerTrainer(model_dir, grad_clip=1.0)
    return batches, [eager.update(batch, CONFIG) for batch in batches], eager.weights()


CPU = {"device": "cpu", "pin_memory": True}


@pytest.mark.parametrize(
    "zero",
    [
        {"stage": 1, "offload_optimizer": CPU},
        {"stage": 2, "offload_optimizer": CPU, "overlap_comm": True},
        {"stage": 3, "offload_optimizer": CPU},
        {"stage": 3, "offload_param": CPU},
    ],
    ids=["1", "2", "3", "3 weights"],
)
def test_offloading_changes_no_update(world, model_dir, oracle, written, zero):
    batches, norms, weights = oracle
    found, found_norms = train(world, written(zero), model_dir, batches)
    assert_same_weights(found, weights)
    assert found_norms == pytest.approx(norms, rel=1e-3)


@pytest.mark.parametrize("path", [ZERO2, ZERO3, OFFLOAD], ids=["zero2", "zero3", "zero3_offload"])
def test_two_ranks_with_a_shipped_file_do_the_written_out_updates(ranks, model_dir, oracle, path):
    batches, norms, weights = oracle
    for found, found_norms in ranks(train, path, model_dir, batches):
        assert_same_weights(found, weights)
        assert found_norms == pytest.approx(norms, rel=1e-3)


def test_an_offloaded_run_resumes_exactly_and_elsewhere(world, model_dir, oracle, tmp_path):
    batches, _, _ = oracle
    first = engine_of(world, OFFLOAD, model_dir)
    first.update(batches[0], PolicyGradient(CONFIG))
    save_engine(first, tmp_path)
    others = engine_of(world, OFFLOAD, model_dir), make_engine(path=model_dir, zero_stage=2, budget=100, world=ALONE)
    for engine in others:
        load_engine(engine, tmp_path)
    for engine in (first, *others):
        engine.update(batches[1], PolicyGradient(CONFIG))
    assert_same_weights(whole_weights(others[0]), whole_weights(first), exact=True)
    assert_same_weights(whole_weights(others[1]), whole_weights(first))


def test_a_stage_that_is_not_the_files_is_refused(written):
    with pytest.raises(UserError, match=r"ds.json has stage 3: set train.zero_stage to it"):
        deepspeed_settings(
            OptimizerConfig(), TrainConfig(deepspeed=written({"stage": 3}), zero_stage=2), torch.bfloat16
        )
