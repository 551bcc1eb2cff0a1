"""The key that a user meant by one that does not exist."""

from collections.abc import Iterator
from difflib import SequenceMatcher

from mssr.config.schema import Config, Section, section_of

# Last part of a key of EasyR1, verl or TRL -> ours. They count differently in places: see the key's description.
FOREIGN = {
    "adam_beta1": "train.optimizer.betas",
    "adam_beta2": "train.optimizer.betas",
    "adv_estimator": "algorithm.name",
    "attn_implementation": "model.attention",
    "beta": "algorithm.kl_coef",
    "clip_ratio": "algorithm.clip_low",
    "clip_ratio_c": "algorithm.dual_clip",
    "clip_ratio_dual": "algorithm.dual_clip",
    "clip_ratio_high": "algorithm.clip_high",
    "clip_ratio_low": "algorithm.clip_low",
    "dataset_name": "data.train",
    "default_local_dir": "run_dir",
    "delta": "algorithm.dual_clip",
    "enable_gradient_checkpointing": "model.gradient_checkpointing",
    "entropy_coeff": "algorithm.entropy_coef",
    "epsilon": "algorithm.clip_low",
    "epsilon_high": "algorithm.clip_high",
    "eval_steps": "eval.every",
    "filter_groups": "algorithm.dynamic_sampling",
    "format_prompt": "data.instruction",
    "freeze_vision_tower": "model.train_vision",
    "global_batch_size": "train.responses_per_update",
    "gpu_memory_utilization": "rollout.gpu_memory",
    "gradient_accumulation_steps": "train.micro_batch_tokens",
    "kl_loss_coef": "algorithm.kl_coef",
    "learning_rate": "train.optimizer.lr",
    "load_checkpoint_path": "run_dir",
    "lora_alpha": "model.lora.alpha",
    "lora_r": "model.lora.rank",
    "lora_rank": "model.lora.rank",
    "lora_target_modules": "model.lora.targets",
    "lr_scheduler_type": "train.optimizer.schedule",
    "lr_warmup_ratio": "train.optimizer.warmup_updates",
    "lr_warmup_steps": "train.optimizer.warmup_updates",
    "mask_truncated_completions": "rollout.truncated",
    "max_completion_length": "rollout.max_response_tokens",
    "max_grad_norm": "train.optimizer.grad_clip",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_response_length": "rollout.max_response_tokens",
    "max_steps": "train.steps",
    "micro_batch_size_per_device_for_update": "train.micro_batch_tokens",
    "model_name_or_path": "model.path",
    "model_path": "model.path",
    "n": "rollout.responses_per_prompt",
    "num_generations": "rollout.responses_per_prompt",
    "num_train_epochs": "train.steps",
    "online_filtering": "algorithm.dynamic_sampling",
    "output_dir": "run_dir",
    "per_device_train_batch_size": "train.responses_per_update",
    "ppo_max_token_len_per_gpu": "train.micro_batch_tokens",
    "ppo_micro_batch_size_per_gpu": "train.micro_batch_tokens",
    "ppo_mini_batch_size": "train.responses_per_update",
    "report_to": "log.tensorboard",
    "rollout_batch_size": "rollout.prompts_per_step",
    "save_checkpoint_path": "run_dir",
    "save_freq": "train.checkpoint_every",
    "save_limit": "train.keep_checkpoints",
    "save_steps": "train.checkpoint_every",
    "save_total_limit": "train.keep_checkpoints",
    "target_modules": "model.lora.targets",
    "tensor_model_parallel_size": "rollout.tensor_parallel",
    "tensor_parallel_size": "rollout.tensor_parallel",
    "test_freq": "eval.every",
    "tis_imp_ratio_cap": "algorithm.tis_cap",
    "torch_dtype": "model.dtype",
    "total_episodes": "train.steps",
    "total_epochs": "train.steps",
    "total_training_steps": "train.steps",
    "train_batch_size": "rollout.prompts_per_step",
    "train_files": "data.train",
    "use_liger": "model.liger",
    "use_liger_kernel": "model.liger",
    "val_files": "data.val",
    "val_freq": "eval.every",
    "vllm_gpu_memory_utilization": "rollout.gpu_memory",
    "vllm_importance_sampling_cap": "algorithm.tis_cap",
    "vllm_mode": "rollout.engine",
    "vllm_server_base_url": "rollout.servers",
    "vllm_tensor_parallel_size": "rollout.tensor_parallel",
    "warmup_steps": "train.optimizer.warmup_updates",
}
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
