"""The key that a user meant by one that does not exist."""

from collections.abc import Iterator
from difflib import SequenceMatcher

from mssr.config.schema import Config
from mssr.config.section import Section, section_of

# Our key: the last parts of its names in EasyR1, verl and TRL. They count differently in places: see the description.
_THEIRS = {
    "algorithm.clip_high": "clip_ratio_high epsilon_high",
    "algorithm.clip_low": "clip_ratio clip_ratio_low epsilon",
    "algorithm.dual_clip": "clip_ratio_c clip_ratio_dual delta",
    "algorithm.dynamic_sampling": "filter_groups online_filtering",
    "algorithm.entropy_coef": "entropy_coeff",
    "algorithm.kl_coef": "beta kl_loss_coef",
    "algorithm.name": "adv_estimator",
    "algorithm.tis_cap": "tis_imp_ratio_cap vllm_importance_sampling_cap",
    "data.instruction": "format_prompt",
    "data.max_prompt_tokens": "max_prompt_length",
    "data.train": "dataset_name train_files",
    "data.val": "val_files",
    "eval.every": "eval_steps test_freq val_freq",
    "log.name": "experiment_name run_name wandb_run_name",
    "log.project": "project_name wandb_project",
    "log.trackers": "logger report_to tensorboard use_wandb",
    "model.attention": "attn_implementation",
    "model.dtype": "torch_dtype",
    "model.gradient_checkpointing": "enable_gradient_checkpointing",
    "model.liger": "use_liger use_liger_kernel",
    "model.lora.alpha": "lora_alpha",
    "model.lora.rank": "lora_r lora_rank",
    "model.lora.targets": "lora_target_modules target_modules",
    "model.path": "model_name_or_path model_path",
    "model.train_vision": "freeze_vision_tower",
    "rollout.engine": "vllm_mode",
    "rollout.gpu_memory": "gpu_memory_utilization vllm_gpu_memory_utilization",
    "rollout.max_response_tokens": "max_completion_length max_response_length",
    "rollout.prompts_per_step": "rollout_batch_size train_batch_size",
    "rollout.responses_per_prompt": "n num_generations",
    "rollout.servers": "vllm_server_base_url",
    "rollout.tensor_parallel": "tensor_model_parallel_size tensor_parallel_size vllm_tensor_parallel_size",
    "rollout.truncated": "mask_truncated_completions",
    "run_dir": "default_local_dir load_checkpoint_path output_dir save_checkpoint_path",
    "train.checkpoint_every": "save_freq save_steps",
    "train.keep_checkpoints": "save_limit save_total_limit",
    "train.micro_batch_tokens": "gradient_accumulation_steps micro_batch_size_per_device_for_update "
    "ppo_max_token_len_per_gpu ppo_micro_batch_size_per_gpu",
    "train.optimizer.betas": "adam_beta1 adam_beta2",
    "train.optimizer.grad_clip": "max_grad_norm",
    "train.optimizer.lr": "learning_rate",
    "train.optimizer.schedule": "lr_scheduler_type",
    "train.optimizer.warmup_updates": "lr_warmup_ratio lr_warmup_steps warmup_steps",
    "train.responses_per_update": "global_batch_size per_device_train_batch_size ppo_mini_batch_size",
    "train.steps": "max_steps num_train_epochs total_episodes total_epochs total_training_steps",
}
FOREIGN = {name: ours for ours, names in _THEIRS.items() for name in names.split()}
MISSPELT = 0.9  # similarity above which a key is a misspelt one of ours


def nearest_key(key: str) -> str:
    """Return the known key that is most like `key`, or like its last part; another trainer's name for one of ours first."""
    known = list(all_keys(Config))
    section, _, last = key.rpartition(".")

    def likeness(candidate: str) -> tuple[float, float, int]:
        its_section, _, its_last = candidate.rpartition(".")
        of_names = max(_similar(key, candidate), _similar(last, its_last))
        return of_names, _share_of(section, its_section), -known.index(candidate)

    best = max(known, key=likeness)
    return best if _similar(key, best) >= MISSPELT else FOREIGN.get(last, best)


def all_keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if inner := section_of(field.annotation):
            yield from all_keys(inner, f"{prefix}{name}.")


def _similar(a: str, b: str) -> float:
    return SequenceMatcher(None, a, b).ratio()


def _share_of(part: str, whole: str) -> float:
    """Return the share of the characters of `part` that `whole` has in the same order."""
    return sum(block.size for block in SequenceMatcher(None, part, whole).get_matching_blocks()) / max(1, len(part))
