"""Every key of a run's configuration: type, range, default and meaning. Validation opens no file.

The sections `data`, `reward` and `algorithm` have files of their own. docs/CONFIG.md is generated from here, by
docs/config_page.py.
"""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from mssr.config.algorithm_keys import AlgorithmConfig
from mssr.config.data_keys import DataConfig
from mssr.config.reward_keys import RewardConfig
from mssr.config.section import NewFolder, OptionalPlace, Place, Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class LoraConfig(Section):
    """Adapters on the language model's linear layers. All other weights are frozen, the vision tower included."""

    rank: int = Field(64, gt=0, description="rank of the adapters")
    alpha: float = Field(128.0, gt=0, description="the adapter's output is scaled by alpha / rank")
    targets: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="names of the linear layers that get an adapter",
    )


class ModelConfig(Section):
    path: Place = Field(description="Hugging Face directory or hub name of the initial policy")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 with float32 master weights on a GPU, float32 on a CPU"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    attention: Literal["auto", "flash", "sdpa"] = Field(
        "auto",
        description="kernel for packed attention; auto: flash-attn where installed (GPU, 16 bits), else PyTorch's SDPA",
    )
    liger: Literal["auto", "on", "off"] = Field(
        "off", description="liger-kernel's RMSNorm, SwiGLU and rotary embeddings; auto: on a GPU where it is installed"
    )
    train_vision: bool = Field(True, description="false: freeze the vision tower")
    lora: LoraConfig | None = Field(None, description="train LoRA adapters instead of the weights; null: off")
    reference: Literal["copy", "sharded", "cpu"] = Field(
        "copy",
        description="where the KL term's reference model is kept: a copy per rank, sharded over the ranks, or on the CPU "
        "between its passes; with lora it is the policy without its adapters and uses no memory",
    )


class RolloutConfig(Section):
    prompts_per_step: int = Field(2048, gt=0, description="prompts per step, over all ranks")
    responses_per_prompt: int = Field(1, gt=0, description="group size; grpo and rloo need 2 or more")
    max_response_tokens: int = Field(4096, gt=0, description="maximum response length")
    temperature: float = Field(1.0, gt=0, description="sampling temperature of the training rollouts")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="draw training rollouts from the most probable tokens that together have this probability; 1: from all; "
        "below 1 it needs algorithm.old_logp recompute",
    )
    top_k: int | None = Field(
        None,
        ge=0,
        description="draw training rollouts from the k most probable tokens, before top_p; null or 0: from all; "
        "otherwise it needs algorithm.old_logp recompute",
    )
    stop: list[str] = Field(
        [], description="texts that end a response, also in validation; the response keeps the token in which one ends"
    )
    truncated: Literal["graded", "masked", "failed"] = Field(
        "graded",
        description="responses cut by max_response_tokens: graded as usual, masked out of the loss, or failed (reward 0)",
    )
    max_gap: float = Field(
        0.1,
        gt=0,
        description="a step is skipped if sampler and trainer log-probs differ by more than this on average, nats per token; "
        "what top_p explains does not count; with one_step_off the gap also includes one step of policy drift, with top_k "
        "the probability that is cut off",
    )
    engine: Literal["auto", "vllm", "servers", "hf"] = Field(
        "auto",
        description="vllm: in the trainer's process; servers: separate vLLM servers; hf: transformers; "
        "auto: vllm if installed, else hf",
    )
    batch_size: int = Field(256, gt=0, description="responses generated at once per rank, or per server and rank")
    gpu_memory: float = Field(0.5, gt=0, le=1, description="fraction of the GPU memory for vLLM's weights and KV cache")
    tensor_parallel: int = Field(1, gt=0, description="GPUs that share one copy of vLLM's weights")
    quantization: Literal["fp8"] | None = Field(
        None, description="quantize vLLM's weights; the GPU must support the format"
    )
    offload_optimizer: bool = Field(
        False, description="move the optimizer state to the CPU while responses are generated"
    )
    sync_gib: float = Field(1.0, gt=0, description="with ZeRO-3: weights gathered at once during the weight sync")
    servers: list[str] = Field([], description="addresses of servers started by `mssr serve`, as http://host:port")
    server_timeout_s: float = Field(
        600.0, gt=0, description="time without an answer after which a server counts as lost"
    )
    one_step_off: bool = Field(False, description="servers generate the next batch while the current one trains")

    @field_validator("stop")
    @classmethod
    def _stop_texts_are_not_empty(cls, stop: list[str]) -> list[str]:
        if "" in stop:
            raise ValueError("expected texts with at least one character, got an empty one")
        return stop

    @property
    def cuts_distribution(self) -> bool:
        """Whether tokens are drawn from a part of the policy's distribution (top_p, top_k)."""
        return self.top_p < 1 or bool(self.top_k)

    @field_validator("servers")
    @classmethod
    def _servers_are_addresses(cls, servers: list[str]) -> list[str]:
        for server in servers:
            if not re.fullmatch(r"http://([^/:?]+|\[[0-9a-fA-F:]+\]):[0-9]+/?", server):
                raise ValueError(f"expected http://host:port, got {server}")
        return servers


class OptimizerConfig(Section):
    lr: float = Field(1e-6, gt=0, description="peak learning rate")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="AdamW's betas, each in [0, 1)")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's weight decay")
    grad_clip: float = Field(0.5, gt=0, description="gradients are clipped to this global norm")
    schedule: Literal["constant", "cosine"] = Field("constant", description="learning rate after the warm-up")
    warmup_updates: int = Field(0, ge=0, description="updates of linear warm-up; 0: full rate from the first update")


class BudgetConfig(Section):
    """The run ends with the first step that has spent one of these. Use it to compare algorithms at equal cost."""

    updates: int | None = Field(None, gt=0, description="end the run after this many optimizer updates; null: no limit")
    rollouts: int | None = Field(
        None, gt=0, description="the same for responses, the value tracker's first rollouts included"
    )
    tokens: int | None = Field(None, gt=0, description="the same for response tokens")
    seconds: float | None = Field(None, gt=0, description="the same for training time; validation does not count")


class TrainConfig(Section):
    steps: int = Field(150, gt=0, description="rollout steps")
    budget: BudgetConfig = BudgetConfig()
    responses_per_update: int = Field(128, gt=0, description="responses per optimizer update, over all ranks")
    micro_batch_tokens: int = Field(
        16_384,
        gt=0,
        description="packed tokens (prompt and response) per micro-batch; changes memory and speed, not the result",
    )
    vocab_drop_tol: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="kernel mode `sparse`: probability mass that the gradient of a token may leave out; null: exact",
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    zero_stage: Literal[0, 1, 2, 3] = Field(
        2, description="ZeRO stage: 1 shards the optimizer state, 2 also the gradients, 3 also the weights"
    )
    deepspeed: OptionalPlace = Field(
        None,
        description="DeepSpeed JSON (configs/deepspeed/) for ZeRO settings and offloading; its stage replaces zero_stage",
    )
    checkpoint_every: int = Field(10, gt=0, description="steps between checkpoints; the last step is always saved")
    checkpoint_minutes: float | None = Field(None, gt=0, description="also save when the last checkpoint is this old")
    keep_checkpoints: int = Field(2, gt=0, description="number of newest checkpoints to keep")
    keep_best: bool = Field(False, description="also save and keep the checkpoint with the best validation accuracy")
    async_save: bool = Field(True, description="write checkpoints in the background, from a copy in host memory")
    max_skipped_steps: int = Field(
        3,
        ge=0,
        description="consecutive steps that may be skipped (non-finite gradient, log-prob gap) before the run stops",
    )


class SftConfig(Section):
    data: OptionalPlace = Field(None, description="rows with a `solution` column to imitate; null: data.train")
    steps: int = Field(200, gt=0, description="maximum number of optimizer updates")
    eval_every: int = Field(50, gt=0, description="updates between validations")
    stop_at_accuracy: float | None = Field(
        None, gt=0, le=1, description="stop at this validation accuracy, to leave RL something to learn"
    )
    batch_size: int = Field(64, gt=0, description="responses per optimizer update, over all ranks")
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5, grad_clip=1.0, schedule="cosine")


class EvalConfig(Section):
    every: int = Field(5, gt=0, description="training steps between validations")
    temperature: float = Field(0.0, ge=0, description="sampling temperature of validation and `mssr eval`; 0: greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="rollout.top_p for validation, which does not use that key")
    top_k: int | None = Field(None, ge=0, description="rollout.top_k for validation, which does not use that key")
    samples: int = Field(
        1, gt=0, description="responses per problem; the accuracy is the mean over all; above 1 needs temperature > 0"
    )
    max_problems: int | None = Field(None, gt=0, description="validate on the first N problems; null: all")


class LogConfig(Section):
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio", "swanlab"]] = Field(
        ["tensorboard"], description="what shows the metrics, besides metrics.jsonl; all but tensorboard need an extra"
    )
    project: str = Field("mssr", min_length=1, description="project (MLflow: experiment) of the run in the trackers")
    name: str | None = Field(None, min_length=1, description="its name there; null: the name of run_dir")
    peak_tflops: float | None = Field(
        None, gt=0, description="peak TFLOP/s of one device, for the MFU; null: known for common GPUs, else no MFU"
    )
    rollouts_every: int = Field(10, gt=0, description="steps between saved rollout samples")
    rollouts_saved: int = Field(8, ge=0, description="rollouts per sample, with their images")

    @field_validator("trackers")
    @classmethod
    def _each_tracker_once(cls, trackers: list[str]) -> list[str]:
        if len(set(trackers)) < len(trackers):
            raise ValueError("a tracker is listed twice; list each one once")
        return trackers


class Config(Section):
    run_dir: NewFolder = Field(description="folder for everything the run writes")
    preset: Literal["default", "paper"] = Field(
        "default",
        description="values for keys that are not set; paper: the authors' choices, docs/CONFIG.md lists them",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of prompt order and sampling noise")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU if torch sees one")
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
        """Return the number of updates that the schedule covers; another budget may end the run earlier."""
        updates = self.train.steps * self.updates_per_step
        return min(updates, self.train.budget.updates or updates)
