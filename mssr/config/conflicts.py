"""Settings that exclude each other. Each refusal names the keys and what to set instead."""

from mssr.algorithms.advantages import ALGORITHMS
from mssr.config.deepspeed_json import offloads_optimizer
from mssr.config.schema import Config


def refuse_conflicts(config: Config) -> None:
    """Raises:
    ValueError: names the keys, and what to set instead.
    """
    _batches_are_whole(config)
    _rollouts_can_be_sampled(config)
    _samples_are_corrected_for(config)
    _algorithm_has_what_it_goes_by(config)
    if config.train.keep_best and config.data.val is None:
        raise ValueError("train.keep_best goes by held-out problems: set data.val")
    if config.sft.stop_at_accuracy is not None and config.data.val is None:
        raise ValueError("sft.stop_at_accuracy needs held-out problems: set data.val")


def _batches_are_whole(config: Config) -> None:
    group, at_once = config.rollout.responses_per_prompt, config.train.responses_per_update
    if config.responses_per_step % at_once:
        each = f" x rollout.responses_per_prompt {group}" if group > 1 else ""
        raise ValueError(
            f"rollout.prompts_per_step {config.rollout.prompts_per_step}{each} is not a multiple of "
            f"train.responses_per_update {at_once}"
        )


def _rollouts_can_be_sampled(config: Config) -> None:
    rollout, train = config.rollout, config.train
    if (rollout.engine == "servers") != bool(rollout.servers):
        raise ValueError(
            "rollout.engine servers and rollout.servers [http://host:port, ...] go together; set both or neither"
        )
    if rollout.one_step_off and rollout.engine != "servers":
        raise ValueError("rollout.one_step_off needs GPUs of its own to generate on: set rollout.engine=servers")
    if rollout.offload_optimizer and train.zero_stage == 0:
        raise ValueError("rollout.offload_optimizer moves ZeRO's optimizer: set train.zero_stage=1, 2 or 3")
    if rollout.offload_optimizer and train.deepspeed and offloads_optimizer(train.deepspeed):
        raise ValueError(
            f"rollout.offload_optimizer, but {train.deepspeed} keeps the optimizer on the CPU already; "
            "set rollout.offload_optimizer=false"
        )
    if rollout.quantization and rollout.engine == "hf":
        raise ValueError("rollout.quantization is vLLM's: set rollout.engine=vllm or servers")


def _samples_are_corrected_for(config: Config) -> None:
    model, rollout, algorithm = config.model, config.rollout, config.algorithm
    corrected = algorithm.old_logp == "recompute" and algorithm.tis_cap is not None
    # Merged into weights of 16 bits, an adapter is rounded; the policy that is trained has it whole.
    half = model.dtype == "bfloat16" or (model.dtype == "auto" and config.device != "cpu")
    rounded = half and model.lora is not None and rollout.engine != "hf"
    for key, used in (
        ("rollout.one_step_off", rollout.one_step_off),
        ("rollout.quantization", rollout.quantization),
        ("model.lora with model.dtype bfloat16 (auto on a GPU)", rounded),
    ):
        if used and not corrected:
            raise ValueError(
                f"{key} samples from another policy than the one that is trained: set "
                "algorithm.old_logp=recompute and algorithm.tis_cap, which correct for it"
            )


def _algorithm_has_what_it_goes_by(config: Config) -> None:
    algorithm, name = config.algorithm, config.algorithm.name
    if ALGORITHMS[name].grouped and config.rollout.responses_per_prompt == 1:
        raise ValueError(f"algorithm.name {name} compares a prompt's responses: set rollout.responses_per_prompt=8")
    if algorithm.dynamic_sampling and not ALGORITHMS[name].grouped:
        raise ValueError(
            "algorithm.dynamic_sampling is for groups of responses: set algorithm.name=grpo or rloo, or leave it out"
        )
    if algorithm.dynamic_sampling and config.rollout.one_step_off:
        raise ValueError(
            "algorithm.dynamic_sampling waits for a step's rewards: set rollout.one_step_off=false, or leave it out"
        )
    if algorithm.prompt_sampling == "prioritised" and not ALGORITHMS[name].tracked:
        raise ValueError(
            "algorithm.prompt_sampling prioritised goes by the value tracker: set algorithm.name=spo, mssr or mvsr"
        )
    if algorithm.prompt_sampling == "prioritised" and config.rollout.one_step_off:
        raise ValueError(
            "algorithm.prompt_sampling prioritised goes by what the last step taught the value tracker: set "
            "rollout.one_step_off=false, or algorithm.prompt_sampling=uniform"
        )
    by_kl = ALGORITHMS[name].tracked and algorithm.tracker.preset == "reference"
    if by_kl and (not algorithm.kl_coef or algorithm.kl_to != "reference"):
        raise ValueError(
            "algorithm.tracker.preset reference goes by the KL to the reference: set algorithm.kl_coef > 0 and "
            "algorithm.kl_to=reference"
        )
