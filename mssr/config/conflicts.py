"""Settings that exclude each other. Each error names the keys and what to set instead."""

from mssr.algorithms.advantages import ALGORITHMS
from mssr.config.data_keys import weights_of
from mssr.config.deepspeed_json import offloads_optimizer
from mssr.config.resolve import device_type, dtype_name
from mssr.config.schema import Config


def refuse_conflicts(config: Config, device: str | None = None) -> None:
    """Check each setting against the others.

    device: "cpu" or "cuda", where the run will be; None: here.

    Raises:
        ValueError: names the keys, and what to set instead.
    """
    _check_batch_sizes(config)
    _check_rollout(config)
    _check_off_policy_samples(config, device)
    _check_algorithm(config)
    _check_eval(config)
    _check_data(config)
    if config.train.keep_best and config.data.val is None:
        raise ValueError("train.keep_best needs held-out problems: set data.val")
    if config.sft.stop_at_accuracy is not None and config.data.val is None:
        raise ValueError("sft.stop_at_accuracy needs held-out problems: set data.val")


def _check_batch_sizes(config: Config) -> None:
    group, at_once = config.rollout.responses_per_prompt, config.train.responses_per_update
    if config.responses_per_step % at_once:
        each = f" x rollout.responses_per_prompt {group}" if group > 1 else ""
        raise ValueError(
            f"rollout.prompts_per_step {config.rollout.prompts_per_step}{each} is not a multiple of "
            f"train.responses_per_update {at_once}"
        )


def _check_rollout(config: Config) -> None:
    rollout, train = config.rollout, config.train
    if (rollout.engine == "servers") != bool(rollout.servers):
        raise ValueError(
            "rollout.engine servers and rollout.servers [http://host:port, ...] go together; set both or neither"
        )
    if len({server.rstrip("/") for server in rollout.servers}) < len(rollout.servers):
        raise ValueError("rollout.servers: an address is listed twice; list each server once")
    if rollout.one_step_off and rollout.engine != "servers":
        raise ValueError("rollout.one_step_off needs separate GPUs for generation: set rollout.engine=servers")
    if rollout.offload_optimizer and train.zero_stage == 0:
        raise ValueError("rollout.offload_optimizer moves ZeRO's optimizer: set train.zero_stage=1, 2 or 3")
    if rollout.offload_optimizer and train.deepspeed and offloads_optimizer(train.deepspeed):
        raise ValueError(
            f"rollout.offload_optimizer, but {train.deepspeed} already keeps the optimizer on the CPU; "
            "set rollout.offload_optimizer=false"
        )
    if rollout.quantization and rollout.engine == "hf":
        raise ValueError("rollout.quantization works with vLLM only: set rollout.engine=vllm or servers")


def _check_off_policy_samples(config: Config, device: str | None) -> None:
    model, rollout, algorithm = config.model, config.rollout, config.algorithm
    corrected = algorithm.old_logp == "recompute" and algorithm.tis_cap is not None
    # Merging an adapter into 16-bit weights rounds it; the trained policy keeps it exact.
    adapters = model.lora is not None and rollout.engine != "hf"
    rounded = adapters and _runs_in_16_bits(config, device)
    for key, used in (
        ("rollout.one_step_off", rollout.one_step_off),
        ("rollout.quantization", rollout.quantization),
        (f"rollout.top_p {rollout.top_p:g}", rollout.top_p < 1),
        (f"rollout.top_k {rollout.top_k}", rollout.top_k),
        (
            f"model.lora with model.dtype {'auto (bfloat16 on a GPU)' if model.dtype == 'auto' else model.dtype}",
            rounded,
        ),
    ):
        if used and not corrected:
            raise ValueError(
                f"{key} samples from a policy that differs from the trained one: set "
                "algorithm.old_logp=recompute and algorithm.tis_cap, which correct for it"
            )


def _runs_in_16_bits(config: Config, device: str | None) -> bool:
    if config.model.dtype != "auto":
        return config.model.dtype == "bfloat16"
    return dtype_name("auto", device or device_type(config.device)) == "bfloat16"  # asks torch, which is slow to import


def _check_eval(config: Config) -> None:
    settings = config.eval
    for key, value, used in (
        ("eval.samples", settings.samples, settings.samples > 1),
        ("eval.top_p", settings.top_p, settings.top_p < 1),
        ("eval.top_k", settings.top_k, settings.top_k),
    ):
        if used and settings.temperature == 0:
            raise ValueError(
                f"{key} {value:g} needs random samples, and eval.temperature 0 is greedy: set eval.temperature=1, for "
                f"example, or leave {key} out"
            )


def _check_algorithm(config: Config) -> None:
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
            "algorithm.prompt_sampling prioritised needs the value tracker: set algorithm.name=spo, mssr or mvsr"
        )
    if algorithm.prompt_sampling == "prioritised" and config.rollout.one_step_off:
        raise ValueError(
            "algorithm.prompt_sampling prioritised needs the last step's update of the value tracker: set "
            "rollout.one_step_off=false, or algorithm.prompt_sampling=uniform"
        )
    needs_kl = ALGORITHMS[name].tracked and algorithm.tracker.preset == "reference"
    if needs_kl and (not algorithm.kl_coef or algorithm.kl_to != "reference"):
        raise ValueError(
            "algorithm.tracker.preset reference needs the KL to the reference: set algorithm.kl_coef > 0 and "
            "algorithm.kl_to=reference"
        )


def _check_data(config: Config) -> None:
    data, name = config.data, config.algorithm.name
    sources = [*weights_of(data.train), *weights_of(config.sft.data or []), data.val]
    for source, columns in data.columns.items():
        if isinstance(columns, dict) and source not in sources:
            raise ValueError(
                f"data.columns has names for {source}, which is not in data.train, data.val or sft.data; write the path "
                "as it is there"
            )
    if data.drop_solved is not None and not ALGORITHMS[name].tracked:
        raise ValueError(
            f"data.drop_solved needs the value tracker, which {name} has not: set algorithm.name=mssr or mvsr"
        )
    if data.drop_solved is not None and config.algorithm.prompt_sampling == "prioritised":
        raise ValueError(
            "data.drop_solved is for epochs; algorithm.prompt_sampling prioritised has none and draws solved prompts "
            "rarely: leave one of them out"
        )
