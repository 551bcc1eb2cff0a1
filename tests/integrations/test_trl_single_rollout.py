"""MSSR inside TRL, one generation per prompt: compared with written-out formulas and with MSSR's own functions."""

import json
import math

import pytest
import torch
from peft import LoraConfig
from PIL import Image
from torch.nn.functional import log_softmax
from transformers import Trainer
from trl import GRPOConfig
from trl_runs import (
    NO_IMAGES,
    gradients,
    image_rows,
    micro_batch,
    text_rows,
    train,
    trainer,
    write_image_model,
    write_text_model,
)

from mssr.algorithms.advantages import batch_normalise
from mssr.algorithms.value_tracker import ValueTracker
from mssr.config.algorithm_keys import TrackerConfig
from mssr.config.resolve import policy_loss
from mssr.errors import UserError
from mssr.integrations.trl.prompt_key import prompt_key
from mssr.integrations.trl.single_rollout import MSSRConfig, MSSRTrainer
from mssr.integrations.trl.tracker_file import load_tracker, save_tracker

STEPS = ("loss", "grad_norm", "entropy", "reward")


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("trl"))


def run(model, folder, rows=None, kind=MSSRTrainer, **options):
    return trainer(kind, MSSRConfig, model, text_rows() if rows is None else rows, folder, **options)


def eager_loss(model, inputs, config, normalizer):
    """Return the loss of `micro_batch`, computed from float64 logits as in MSSR's paper."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    length = inputs["completion_ids"].shape[1]
    logits = (
        model(ids, attention_mask=attention, use_cache=False).logits[:, -length - 1 : -1].double() / config.temperature
    )
    log_p = log_softmax(logits, -1)
    logp = log_p.gather(2, inputs["completion_ids"][:, :, None])[:, :, 0]
    entropy = -(log_p.exp() * log_p).sum(-1).detach()
    advantage = inputs["advantages"].double()[:, None]
    shaped = advantage + torch.minimum(config.entropy_alpha * entropy, advantage.abs() / config.entropy_kappa)
    ratio = (logp - inputs["old_per_token_logps"]).exp()
    objective = torch.minimum(ratio * shaped, ratio.clamp(1 - config.epsilon, 1 + config.epsilon_high) * shaped)
    objective = torch.where(shaped < 0, torch.maximum(objective, config.dual_clip * shaped), objective)
    d = inputs["ref_per_token_logps"] - logp
    weight = torch.ones_like(logp)
    if "sampling_per_token_logps" in inputs:
        weight = (inputs["old_per_token_logps"] - inputs["sampling_per_token_logps"]).exp().clamp(max=1.2)
        weight = weight.nan_to_num(1.0).detach()
    loss = -objective * weight + config.beta * (d.exp() - d - 1)
    return (loss * inputs["completion_mask"] * inputs.get("tool_mask", 1)).sum() / normalizer


@pytest.mark.parametrize("head", [None, "frozen", "trained"], ids=["whole", "adapters", "adapters and head"])
def test_loss_and_gradients_are_those_of_the_formulas(head, text_model, tmp_path):
    """head: of a model with adapters, frozen or a trained copy; None: a model without adapters."""
    options = dict(beta=0.05, dual_clip=1.2, temperature=0.9)
    if head is not None:
        copies = ["lm_head"] if head == "trained" else None
        options["peft_config"] = LoraConfig(r=4, init_lora_weights=False, modules_to_save=copies)
    own = run(text_model, tmp_path, **options)
    inputs = micro_batch()
    inputs["tool_mask"] = torch.ones_like(inputs["completion_mask"])
    inputs["tool_mask"][0, 2:4] = 0  # a tool wrote these tokens, not the policy
    loss, ours = gradients(own, inputs)
    own.model.zero_grad()
    wanted = eager_loss(own.model, inputs, own.args, inputs["num_items_in_batch"])
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    trained = {name: parameter for name, parameter in own.model.named_parameters() if parameter.requires_grad}
    assert set(ours) == set(trained)
    assert sum("lm_head" in name for name in trained) == (head != "frozen")
    for name, parameter in trained.items():
        assert (ours[name] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-8, name


def test_the_samplers_drift_is_corrected_by_truncated_weights(text_model, tmp_path):
    """As in TRL with vLLM: a token that vLLM could not score is not corrected."""
    corrected = dict(use_vllm=True, vllm_importance_sampling_clip_max=1.2)
    algorithm = MSSRConfig(str(tmp_path), use_cpu=True, bf16=False, beta=0.05, **corrected).algorithm()
    own = run(text_model, tmp_path, beta=0.05)
    own.loss = policy_loss(algorithm)  # without vLLM itself
    inputs = micro_batch()
    inputs["sampling_per_token_logps"] = inputs["old_per_token_logps"] + 0.3 * torch.randn(4, 6)
    inputs["sampling_per_token_logps"][0, 1] = torch.nan
    loss, _ = gradients(own, inputs)
    wanted = eager_loss(own.model, inputs, own.args, inputs["num_items_in_batch"])
    assert loss == pytest.approx(wanted.item(), rel=1e-5)


def test_a_run_learns_and_logs_what_trl_logs(text_model, tmp_path):
    options = dict(max_steps=20, num_iterations=2, beta=0.01, learning_rate=3e-3)
    steps = train(MSSRTrainer, MSSRConfig, text_model, text_rows(), tmp_path, **options)
    assert len(steps) == 20
    rewards = [step["reward"] for step in steps if "reward" in step]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.1
    assert {"entropy", "kl", "clip_ratio/low_min", "clip_ratio/high_max", "clip_ratio/region_mean"} <= set(steps[1])
    assert {"shaping/mean", "clip_ratio/dual_mean", "clip_ratio/capped_mean"} <= set(steps[1])
    drifts = [step["tracker/drift"] for step in steps if "tracker/drift" in step]
    assert drifts[0] == 0 and min(drifts[1:]) > 0
    for drift, rho in zip(drifts, (step["tracker/rho"] for step in steps if "tracker/rho" in step)):
        assert rho == pytest.approx(min(max(2 ** (-drift / 0.06), 0.875), 0.96))
    assert "frac_reward_zero_std" not in steps[0]
    assert all(math.isfinite(step["grad_norm"]) for step in steps)


def test_a_run_with_images(tmp_path):
    model = write_image_model(tmp_path)
    options = dict(max_steps=3, steps_per_generation=2) | NO_IMAGES
    steps = train(MSSRTrainer, MSSRConfig, model, image_rows(), tmp_path, **options)
    assert all(step["grad_norm"] > 0 for step in steps)


class Recorded(MSSRTrainer):
    """Records for each batch the prompts' ids, the tracker's values before it, and the advantages."""

    batches = ()

    def _generate_and_score_completions(self, inputs):
        before = self.tracker.values([str(row["id"]) for row in inputs])
        output = super()._generate_and_score_completions(inputs)
        self.batches = (*self.batches, ([row["id"] for row in inputs], before, output["advantages"]))
        return output


def test_advantages_are_rewards_minus_the_trackers_values_normalised(text_model, tmp_path):
    """Tracker formulas: a = rho a + r, b = rho b + 1 - r, from (4, 4), with rho 0.96 because there is no drift."""
    rows = text_rows(4, id=[10, 11, 12, 13])
    given = {10: [1.0, 0.25], 11: [0.0, 1.0], 12: [0.5, None], 13: [1.0, 0.0]}
    visits = dict.fromkeys(given, 0)

    def reward(completions, id, **_):
        for key in id:
            visits[key] += 1
        return [given[key][visits[key] - 1] for key in id]

    own = run(text_model, tmp_path, rows, Recorded, max_steps=2, per_device_train_batch_size=4)
    own.reward_funcs = [reward]
    own.train()
    state = {key: (4.0, 4.0) for key in given}
    for visit, (keys, before, advantages) in enumerate(own.batches):
        values = torch.tensor([state[key][0] / sum(state[key]) for key in keys])
        assert torch.allclose(before, values)
        rewards = [given[key][visit] for key in keys]
        scored = torch.tensor([value is not None for value in rewards])
        difference = torch.tensor([value or 0.0 for value in rewards]) - values
        expected = torch.zeros(4)
        expected[scored] = batch_normalise(difference[scored])
        assert torch.allclose(advantages, expected, atol=1e-6)
        for key, value in zip(keys, rewards):
            if value is not None:
                a, b = state[key]
                state[key] = 0.96 * a + value, 0.96 * b + 1 - value
    assert own.state.log_history[0]["tracker/value_mean"] == 0.5


def test_a_resumed_run_is_the_run_that_was_not_interrupted(text_model, tmp_path):
    """Within one epoch only: in the next one, TRL's resumed sampler repeats the order of the first."""
    options = dict(save_strategy="steps", save_steps=2, max_steps=4, steps_per_generation=2)
    rows = text_rows(32, id=[row % 12 for row in range(32)])
    whole = run(text_model, tmp_path / "whole", rows, **options)
    whole.train()
    resumed = run(text_model, tmp_path / "resumed", rows, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected, found = whole.tracker.state_dict(), resumed.tracker.state_dict()
    assert found["keys"] == expected["keys"]
    assert torch.equal(found["beta"], expected["beta"])
    for theirs, ours in zip(whole.state.log_history[:4], resumed.state.log_history[:4]):
        assert all(ours.get(name) == theirs.get(name) for name in STEPS)

    newest = tmp_path / "whole" / "checkpoint-4"
    (newest / "value_tracker.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"checkpoint-4/value_tracker.pt: damaged \(0 bytes\); .*/checkpoint-2, or"):
        resumed.train(resume_from_checkpoint=str(newest))


def test_a_damaged_tracker_is_one_line_that_names_a_whole_checkpoint(tmp_path):
    """The checkpoint of step 10 is the newest, 9 has a whole tracker, but TRL did not finish it."""
    tracker = ValueTracker(TrackerConfig())
    tracker.update(["a", "b"], torch.tensor([1.0, 0.0]), 0.9)
    state = {"tracker": tracker.state_dict(), "moved": torch.tensor([1.0, 2.0])}
    folders = [tmp_path / f"checkpoint-{step}" for step in (2, 8, 9, 10)]
    for folder in folders:
        save_tracker(state, folder)
        assert [path.name for path in folder.iterdir()] == ["value_tracker.pt"]
    for folder in (folders[0], folders[1], folders[3]):
        (folder / "trainer_state.json").write_text("{}")
    newest = folders[-1]
    assert load_tracker(newest)["tracker"]["keys"] == ["a", "b"]

    file = newest / "value_tracker.pt"
    whole = file.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole[:-1], whole[:100], b"not a file of torch"):
        file.write_bytes(damaged)
        with pytest.raises(UserError) as refused:
            load_tracker(newest)
        way_out = f"resume from {folders[1]}, or start a new run"
        assert str(refused.value) == f"{file}: damaged ({len(damaged)} bytes); {way_out}"
    file.unlink()
    with pytest.raises(UserError, match="value_tracker.pt: missing; resume from"):
        load_tracker(newest)
    for folder in folders[:-1]:
        (folder / "value_tracker.pt").unlink()
    with pytest.raises(UserError, match="missing; resume from a checkpoint of MSSRTrainer, or start a new run"):
        load_tracker(newest)


def test_a_tracker_that_cannot_be_written_leaves_the_one_that_was_there(tmp_path, monkeypatch):
    save_tracker({"tracker": 1, "moved": 2}, tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr("os.fsync", full)
        save_tracker({"tracker": 3, "moved": 4}, tmp_path)
    assert load_tracker(tmp_path) == {"tracker": 1, "moved": 2}


def test_the_tracker_is_saved_before_older_checkpoints_are_removed(text_model, tmp_path, monkeypatch):
    """Else a kill in between would leave no checkpoint with a tracker."""
    own = run(text_model, tmp_path, max_steps=1)
    seen = []
    monkeypatch.setattr(Trainer, "_save_checkpoint", lambda *_: seen.extend(tmp_path.rglob("*.pt")))
    own._save_checkpoint(own.model, None)
    assert seen == [tmp_path / "checkpoint-0" / "value_tracker.pt"]


def test_log_ratios_that_were_capped_are_logged(text_model, tmp_path):
    own = run(text_model, tmp_path)
    inputs = micro_batch()
    inputs["old_per_token_logps"][0, :3] -= 40  # three of 16 tokens, two beyond the response of the second row
    inputs["old_per_token_logps"][1, 1:3] -= 40
    gradients(own, inputs)
    own.log({})
    assert own.state.log_history[-1]["eval_clip_ratio/capped_mean"] == pytest.approx(3 / 16)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (dict(num_generations=4), r"MSSRConfig.num_generations must be 1, got 4: .*"),
        (dict(loss_type="grpo"), r"MSSRConfig.loss_type must be 'dapo', got 'grpo': .*"),
        (dict(delta=2.0), r"MSSRConfig.delta must be None, got 2.0: dual_clip .*"),
        (dict(scale_rewards="group"), r"MSSRConfig.scale_rewards must be 'batch', got 'group': .*"),
        (dict(use_bias_correction_kl=True), r"MSSRConfig.use_bias_correction_kl must be False, got True: .*"),
        (dict(entropy_kappa=0.0), r"MSSRConfig, entropy_kappa: Input should be greater than 0"),
        (dict(tracker_rho_min=0.97), r"MSSRConfig, tracker: .*rho_min 0.97 is larger than rho_max 0.96"),
        (dict(per_device_train_batch_size=1), r"MSSRConfig.per_device_train_batch_size 1 .*"),
        (
            dict(vllm_importance_sampling_mode="sequence_mask"),
            r"MSSRConfig.vllm_importance_sampling_mode must be 'token_truncate', got 'sequence_mask': .*",
        ),
        (dict(vllm_importance_sampling_clip_min=0.5), r"MSSRConfig.vllm_importance_sampling_clip_min must be None, .*"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_this_objective_does_not_have_is_refused(options, line, tmp_path):
    with pytest.raises(UserError, match=f"^{line}$"):
        MSSRConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


def test_an_odd_batch_is_no_group(tmp_path):
    config = MSSRConfig(str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=3)
    assert (config.num_generations, config.num_generations_eval, config.generation_batch_size) == (1, None, 3)


def test_a_configuration_of_grpo_is_refused(text_model, tmp_path):
    with pytest.raises(UserError, match=r"^MSSRTrainer: args is a GRPOConfig; pass an MSSRConfig$"):
        trainer(MSSRTrainer, GRPOConfig, text_model, text_rows(), tmp_path, num_generations=4)


def test_rewards_outside_the_unit_interval_are_refused(text_model, tmp_path):
    own = run(text_model, tmp_path, text_rows(8, id=list(range(8))), max_steps=1)
    own.reward_funcs = [lambda completions, **_: [2.0] * len(completions)]
    with pytest.raises(UserError, match=r"^prompt \d+: reward 2.0 is not in \[0, 1\]; .*$"):
        own.train()


def test_a_prompt_is_known_by_its_id_or_its_content():
    def question(text, shade):
        return {"prompt": [{"role": "user", "content": text}], "image": Image.new("L", (4, 2), shade), "answer": "7"}

    assert prompt_key({"id": 7, **question("a", 1)}) == "7"
    keys = [prompt_key(question(text, shade)) for text, shade in (("a", 1), ("a", 2), ("b", 1))]
    assert len(set(keys)) == 3
    assert prompt_key(question("a", 1) | {"answer": "8"}) == keys[0]
    assert prompt_key(json.loads('{"prompt": "a", "images": null}')) == prompt_key({"prompt": "a"})
    with pytest.raises(UserError, match=r"^a prompt contains a Tensor, .* add a column `id` to the dataset$"):
        prompt_key({"prompt": "a", "image": torch.zeros(1)})
