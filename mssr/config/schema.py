"""All keys of a run's configuration: type, range, default and meaning. Validation opens no file."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mssr.algorithms.advantages import ALGORITHMS

DEFAULT_INSTRUCTION = "Think step by step inside <think></think> tags, then give the final answer in \\boxed{}."


Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class LoraConfig(Section):
    """Adapters on the language model's linear layers; everything else stays as it was, the vision tower too."""

    rank: int = Field(64, gt=0)
    alpha: float = Field(128.0, gt=0, description="the adapters' product is scaled by alpha / rank")
    targets: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="names of the layers that get an adapter",
    )


class ModelConfig(Section):
    path: str = Field(description="Hugging Face directory or hub name of the policy to start from")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 with fp32 master weights on a GPU, float32 on a CPU"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    attention: Literal["auto", "flash", "sdpa"] = Field(
        "auto", description="of packed sequences; auto: flash-attn where it is installed (GPU, 16 bits), else sdpa"
    )
    liger: Literal["auto", "on", "off"] = Field(
        "off", description="liger-kernel's RMSNorm, SwiGLU and rotary layers; auto: on a GPU where it is installed"
    )
    train_vision: bool = Field(True, description="false: the vision tower stays as it was")
    lora: LoraConfig | None = Field(None, description="train adapters instead of the weights")
    reference: Literal["copy", "sharded", "cpu"] = Field(
        "copy",
        description="the KL term's reference model: on every rank, over all ranks, or on the CPU between its passes; "
        "with lora it is the policy without adapters and takes nothing",
    )


class DataConfig(Section):
    train: str = Field(description="parquet or JSON lines file, directory, or hub name (name:split for a split)")
    val: str | None = Field(None, description="held-out problems in the same format")
    instruction: str = Field(DEFAULT_INSTRUCTION, description="text that follows the problem in every prompt")
    max_prompt_tokens: int = Field(2048, gt=0, description="longest prompt, image tokens included")
    min_pixels: int = Field(262_144, gt=0, description="smaller images are scaled up to this many pixels")
    max_pixels: int = Field(4_194_304, gt=0, description="larger images are scaled down to this many pixels")
    on_bad_row: Literal["fail", "skip"] = Field("fail", description="what an unusable row does to the run")
    cache_gib: float = Field(1.0, ge=0, description="preprocessed prompts each rank keeps in host memory")

    @model_validator(mode="after")
    def _pixels_ordered(self):
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is larger than max_pixels {self.max_pixels}")
        return self


class RewardConfig(Section):
    format_weight: float = Field(0.0, ge=0, le=1, description="reward = (1 - w) * correct + w * well-formed")
    timeout_s: float = Field(5.0, gt=0, description="seconds a symbolic comparison may take before it is killed")


class TrackerConfig(Section):
    """See `mssr.algorithms.value_tracker`."""

    preset: Literal["default", "reference"] = Field(
        "default", description="default: per-prompt drift, smoothed start; reference: the authors' rules"
    )
    n_init: int = Field(1, ge=0, description="rollouts of every prompt before training; 0 starts each at v = 0.5")
    rho_min: float = Field(0.875, gt=0, lt=1, description="strongest forgetting; N0 = 1 / (1 - rho_min)")
    rho_max: float = Field(0.96, gt=0, lt=1, description="weakest forgetting")
    half_life: float = Field(0.06, gt=0, description="drift (nats a token) that halves the memory")
    drift: Literal["prompt", "batch"] = Field(
        "prompt", description="prompt: rescore each prompt's previous response; batch: last step's mean, no extra pass"
    )

    @model_validator(mode="after")
    def _rho_ordered(self):
        if self.rho_min > self.rho_max:
            raise ValueError(f"rho_min {self.rho_min} is larger than rho_max {self.rho_max}")
        return self


class AlgorithmConfig(Section):
    name: Literal[tuple(ALGORITHMS)] = Field(
        "mssr",
        description="mssr, mvsr, spo: a baseline from the value tracker; grpo, rloo: from a prompt's other responses",
    )
    tracker: TrackerConfig = TrackerConfig()
    prompt_sampling: Literal["uniform", "prioritised"] = Field(
        "uniform", description="prioritised: prompts of uncertain value more often (what spo does by default)"
    )
    dynamic_sampling: int = Field(
        0,
        ge=0,
        description="DAPO: rounds of other prompts in place of those whose responses all earned the same; 0: off",
    )
    entropy_alpha: float = Field(0.4, ge=0, description="shaping strength (arXiv 2506.14758)")
    entropy_kappa: float = Field(2.0, gt=0, description="shaping is at most |A| / kappa")
    entropy_source: Literal["exact", "sampled_token"] = Field(
        "exact", description="exact: full-vocabulary entropy; sampled_token: the authors' -p log p proxy"
    )
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.3, gt=0)
    dual_clip: float | None = Field(3.0, gt=1, description="bound of the ratio for negative advantages; null: off")
    kl_coef: float = Field(0.01, ge=0, description="weight of the KL term; 0 loads no reference")
    kl_to: Literal["reference", "text_only"] = Field(
        "reference",
        description="k3(current || frozen reference), or || the policy itself at the step's start, images blank",
    )
    entropy_coef: float = Field(0.0, ge=0, description="weight of an entropy bonus in the loss")
    old_logp: Literal["rollout", "recompute"] = Field(
        "rollout",
        description="rollout: the sampler's own log-probs, no extra pass; recompute: a trainer pass, with TIS",
    )
    tis_cap: float | None = Field(2.0, gt=0, description="cap of the truncated importance weight; null: no correction")

    @property
    def rescores_responses(self) -> bool:
        """Whether a prompt's drift is measured by a pass over its previous response."""
        return ALGORITHMS[self.name].tracked and self.tracker.preset == "default" and self.tracker.drift == "prompt"

    @model_validator(mode="before")
    @classmethod
    def _spo_prioritises(cls, values: Any) -> Any:
        algorithm = ALGORITHMS.get(values.get("name")) if isinstance(values, dict) else None
        if algorithm is not None and algorithm.prioritised:
            return {"prompt_sampling": "prioritised"} | values
        return values


class RolloutConfig(Section):
    prompts_per_step: int = Field(2048, gt=0, description="prompts of one step over all ranks")
    responses_per_prompt: int = Field(1, gt=0, description="the group that grpo and rloo compare; one for the others")
    max_response_tokens: int = Field(4096, gt=0)
    temperature: float = Field(1.0, gt=0)
    truncated: Literal["graded", "masked", "failed"] = Field(
        "graded",
        description="responses cut by the token limit: graded like others, left out of the loss, or given reward 0",
    )
    max_gap: float = Field(
        0.1,
        gt=0,
        description="largest mean |log-prob gap| sampler/trainer, nats; one step off it includes a step's updates",
    )
    engine: Literal["auto", "vllm", "servers", "hf"] = Field(
        "auto", description="vllm: in the trainer's process; servers: elsewhere; auto: vllm where installed, else hf"
    )
    batch_size: int = Field(256, gt=0, description="responses generated at once on a rank, or a server for a rank")
    gpu_memory: float = Field(0.5, gt=0, le=1, description="share of the GPU for vLLM's weights and KV cache")
    tensor_parallel: int = Field(1, gt=0, description="GPUs that share one copy of vLLM's weights")
    quantization: Literal["fp8"] | None = Field(None, description="vLLM's weights; needs a GPU that has the format")
    offload_optimizer: bool = Field(False, description="optimizer state on the CPU while responses are generated")
    sync_gib: float = Field(1.0, gt=0, description="weights gathered at once for the sync under ZeRO-3")
    servers: list[str] = Field([], description="addresses of servers started by `mssr serve`: http://host:port")
    server_timeout_s: float = Field(600.0, gt=0, description="how long to wait for a server before it counts as dead")
    one_step_off: bool = Field(False, description="servers generate the next batch while this one trains")


class OptimizerConfig(Section):
    lr: float = Field(1e-6, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: float = Field(0.01, ge=0)
    grad_clip: float = Field(0.5, gt=0, description="largest global gradient norm")
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_updates: int = Field(0, ge=0, description="updates of linear warm-up; 0: the full rate from the first one")


class BudgetConfig(Section):
    """Ends a run with the first step that has spent this much: what algorithms are compared at."""

    updates: int | None = Field(None, gt=0, description="optimiser steps")
    rollouts: int | None = Field(None, gt=0, description="responses, the value tracker's start included")
    tokens: int | None = Field(None, gt=0, description="tokens of these responses")
    seconds: float | None = Field(None, gt=0, description="of training; validation does not count")


class TrainConfig(Section):
    steps: int = Field(150, gt=0, description="rollout steps")
    budget: BudgetConfig = BudgetConfig()
    responses_per_update: int = Field(128, gt=0, description="responses of one optimiser step over all ranks")
    micro_batch_tokens: int = Field(16_384, gt=0, description="packed tokens (prompt + response) of a micro-batch")
    vocab_drop_tol: float | None = Field(
        None, gt=0, lt=1, description="probability of a token's row that its gradient may leave out; null: exact"
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    zero_stage: Literal[0, 1, 2, 3] = Field(
        2, description="ranks share the optimiser's state from 1, gradients from 2, with 3 also the weights"
    )
    deepspeed: str | None = Field(
        None, description="DeepSpeed JSON file (configs/deepspeed/): ZeRO's own settings, offloading; its stage counts"
    )
    checkpoint_every: int = Field(10, gt=0, description="steps between checkpoints; the last step always saves")
    checkpoint_minutes: float | None = Field(None, gt=0, description="also when the last one is this old")
    keep_checkpoints: int = Field(2, gt=0, description="newest ones that are kept")
    keep_best: bool = Field(False, description="save, and keep, at the best validation as well")
    async_save: bool = Field(True, description="write while training goes on, from a copy in host memory")
    max_skipped_steps: int = Field(
        3, ge=0, description="steps in a row that may be left out (NaN, log-prob gap) before the run stops"
    )


class SftConfig(Section):
    data: str | None = Field(None, description="rows with a `solution` to imitate; null: data.train")
    steps: int = Field(200, gt=0, description="optimiser steps at most")
    eval_every: int = Field(50, gt=0, description="steps between validations")
    stop_at_accuracy: float | None = Field(
        None, gt=0, le=1, description="end at the first validation this good: a start that leaves RL something to learn"
    )
    batch_size: int = Field(64, gt=0, description="responses of one optimiser step over all ranks")
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5, grad_clip=1.0, schedule="cosine")


class EvalConfig(Section):
    every: int = Field(5, gt=0, description="steps between validations during training")
    temperature: float = Field(0.0, ge=0, description="0: greedy")
    max_problems: int | None = Field(None, gt=0, description="first N held-out problems; null: all")


class LogConfig(Section):
    tensorboard: bool = True
    peak_tflops: float | None = Field(
        None, gt=0, description="of one device, for the MFU; null: known for common GPUs, else no MFU"
    )
    rollouts_every: int = Field(10, gt=0, description="steps between saved samples of rollouts")
    rollouts_saved: int = Field(8, ge=0, description="rollouts in a sample, with their images")


class Config(Section):
    run_dir: Path = Field(description="everything the run leaves is in here")
    preset: Literal["default", "paper"] = Field(
        "default", description="fills what is left open; paper: its authors' choices, see mssr/config/presets.py"
    )
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    model: ModelConfig
    data: DataConfig
    reward: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    rollout: RolloutConfig = RolloutConfig()
    train: TrainConfig = TrainConfig()
    sft: SftConfig = SftConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()

    @property
    def responses_per_step(self) -> int:
        return self.rollout.prompts_per_step * self.rollout.responses_per_prompt

    @property
    def loads_reference(self) -> bool:
        """Whether the KL term needs weights of its own: with lora they are the policy's without adapters."""
        return self.algorithm.kl_coef > 0 and self.algorithm.kl_to == "reference" and self.model.lora is None

    @property
    def updates_per_step(self) -> int:
        return self.responses_per_step // self.train.responses_per_update

    @property
    def total_updates(self) -> int:
        """What a learning rate's schedule runs over; a budget of something else than updates may end the run before."""
        updates = self.train.steps * self.updates_per_step
        return min(updates, self.train.budget.updates or updates)
