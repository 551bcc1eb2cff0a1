"""What one of two ranks does in a run of TRL's trainers, under DDP or under DeepSpeed without a GPU."""

import os

import torch
from accelerate.state import AcceleratorState, PartialState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import GRPOConfig
from trl_runs import text_rows, trainer

from mssr.integrations.trl.single_rollout import MSSRConfig, MSSRTrainer

IDS = list(range(8))
REWARDS = {row: None if row == 5 else 37 * row % 11 / 10 for row in IDS}


class Recorded(MSSRTrainer):
    """Records the advantages of this rank's responses."""

    advantages = ()

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.advantages = (*self.advantages, output["advantages"])
        return output


def grpo_steps(world, kind, stage: int, model, folder) -> list[dict[str, float]]:
    """Return what a GRPOTrainer of class `kind` logs at each step. stage: ZeRO's; 0: DDP."""
    sampling = dict(generation_kwargs=ends_sometimes(3.0), num_generations=4)
    return _steps(_trained(kind, GRPOConfig, stage, model, folder, max_steps=2, beta=0.02, **sampling))


def mssr_run(world, stage: int, model, folder):
    """Train MSSR on 8 prompts per step over all ranks, with greedy decoding; return its logs, advantages and tracker."""
    greedy = ends_sometimes(1.0) | {"do_sample": False}
    own = _trained(
        Recorded, MSSRConfig, stage, model, folder, generation_kwargs=greedy, per_device_train_batch_size=8 // world.size,
        max_steps=4, num_iterations=2, beta=0.02,
    )  # fmt: skip
    return _steps(own), own.advantages, own.tracker.state_dict()


def ends_sometimes(bias: float) -> dict:
    """Return generation options that favour the end token, so that an untrained model's responses differ in length."""
    return {"sequence_bias": [[[2], bias]]}


def reward_of_the_prompt(completions, id, **_):
    return [REWARDS[row] for row in id]


def _trained(kind, config, stage: int, model, folder, **options):
    torch.manual_seed(0)
    _forget_the_last_run()
    settings = dict(max_grad_norm=1.0, per_device_train_batch_size=4) | options
    if stage:
        settings |= _deepspeed(stage)
    own = trainer(kind, config, model, text_rows(8, id=IDS), folder, **settings)
    if kind is Recorded:
        own.reward_funcs = [reward_of_the_prompt]
    own.train()
    assert (own.model.get_output_embeddings().weight.numel() == 0) == (stage == 3)  # sharded
    return own


def _steps(own) -> list[dict[str, float]]:
    return [step for step in own.state.log_history if "loss" in step]


def _deepspeed(stage: int) -> dict:
    """Return options for DeepSpeed, and start gloo: without a GPU accelerate starts no backend, and ranks would run alone."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    zero = {"stage": stage, "overlap_comm": False}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 10  # by default weights as small as these are never sharded
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return dict(
        deepspeed={"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False} | dict.fromkeys(automatic, "auto"),
        accelerator_config={"use_configured_state": True},
        use_cpu=False,
    )


def _forget_the_last_run() -> None:
    """Reset the kind of run, which accelerate and transformers keep in their modules."""
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()
