"""Options of MSSR in TRL: a GRPOConfig with one generation per prompt."""

from dataclasses import dataclass, field

from pydantic import ValidationError
from trl import GRPOConfig

from mssr.config.algorithm_keys import AlgorithmConfig, TrackerConfig
from mssr.errors import UserError

# Options of GRPOConfig that this objective does not have: the required value, and the reason or the alternative.
_FIXED = {
    "num_generations": (1, "the value tracker is the baseline, not a group"),
    "loss_type": ("dapo", "the loss is the mean over the tokens of an optimiser step, which is what dapo divides by"),
    "importance_sampling_level": ("token", "the ratio is clipped token by token"),
    "scale_rewards": ("batch", "advantages are normalised over the generation batch"),
    "multi_objective_aggregation": ("sum_then_normalize", "rewards are summed, then compared with the tracker"),
    "delta": (None, "dual_clip bounds the ratio of negative advantages"),
    "top_entropy_quantile": (1.0, "entropy_alpha weights tokens by their entropy"),
    "use_adaptive_entropy": (False, "entropy_coef is constant"),
    "off_policy_mask_threshold": (None, "vllm_importance_sampling_correction corrects the sampler's drift"),
    "vllm_importance_sampling_mode": ("token_truncate", "the ratio to the sampler is truncated token by token"),
    "vllm_importance_sampling_clip_min": (None, "vllm_importance_sampling_clip_max alone truncates the ratio"),
    "use_bias_correction_kl": (False, "the KL term is plain k3"),
}


@dataclass
class MSSRConfig(GRPOConfig):
    """GRPOConfig for MSSR (arXiv 2512.18215). Options that are not listed here have TRL's meaning.

    epsilon, epsilon_high   the ratio is clipped to [1 - epsilon, 1 + epsilon_high]
    beta                    weight of the KL term, k3 against the frozen reference
    entropy_coef            weight of an entropy bonus, the mean over the tokens of an optimiser step
    entropy_alpha, entropy_kappa, entropy_source, dual_clip
                            `mssr_kernels.PolicyLossConfig`; alpha 0 trains without shaping
    tracker_rho_min, tracker_rho_max, tracker_half_life
                            how fast the value tracker forgets (`mssr.config.TrackerConfig`)

    Rewards, weighted and summed, must be in [0, 1]: the tracker is a Beta distribution.

    Raises:
        UserError: an option that this objective does not support, or a value out of range.
    """

    num_generations: int | None = field(default=1, metadata={"help": "One: the value tracker is the baseline."})
    scale_rewards: str = field(default="batch", metadata={"help": "Advantages are normalised over the batch."})
    epsilon_high: float | None = field(default=0.3, metadata={"help": "Upper bound of the ratio, minus 1."})
    use_bias_correction_kl: bool = field(default=False, metadata={"help": "The KL term is plain k3."})
    vllm_importance_sampling_mode: str = field(default="token_truncate", metadata={"help": "Only token_truncate."})
    entropy_alpha: float = field(default=0.4, metadata={"help": "Shaping strength (arXiv 2506.14758)."})
    entropy_kappa: float = field(default=2.0, metadata={"help": "Shaping is at most |A| / kappa."})
    entropy_source: str = field(default="exact", metadata={"help": "exact, or sampled_token: the authors' -p log p."})
    dual_clip: float | None = field(default=3.0, metadata={"help": "Bound of the ratio for negative advantages."})
    tracker_rho_min: float = field(default=0.875, metadata={"help": "Strongest forgetting; N0 = 1 / (1 - rho_min)."})
    tracker_rho_max: float = field(default=0.96, metadata={"help": "Weakest forgetting."})
    tracker_half_life: float = field(default=0.06, metadata={"help": "Drift (nats per token) that halves the memory."})

    def __post_init__(self) -> None:
        for name, (value, instead) in _FIXED.items():
            if getattr(self, name) != value:
                raise UserError(f"MSSRConfig.{name} must be {value!r}, got {getattr(self, name)!r}: {instead}")
        self.num_generations = self._responses_per_rank()
        generations_eval, self.num_generations_eval = self.num_generations_eval, self.num_generations_eval or 1
        super().__post_init__()
        self.num_generations, self.num_generations_eval = 1, generations_eval
        self.algorithm()

    def algorithm(self) -> AlgorithmConfig:
        """Return the options as MSSR's own trainer defines them.

        Raises:
            UserError: a value is out of range.
        """
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        try:
            return AlgorithmConfig(
                name="mssr",
                tracker=TrackerConfig(
                    n_init=0,
                    rho_min=self.tracker_rho_min,
                    rho_max=self.tracker_rho_max,
                    half_life=self.tracker_half_life,
                    drift="batch",
                ),
                entropy_alpha=self.entropy_alpha,
                entropy_kappa=self.entropy_kappa,
                entropy_source=self.entropy_source,
                clip_low=self.epsilon,
                clip_high=self.epsilon if self.epsilon_high is None else self.epsilon_high,
                dual_clip=self.dual_clip,
                kl_coef=self.beta,
                entropy_coef=self.entropy_coef,
                old_logp="recompute" if corrected else "rollout",
                tis_cap=self.vllm_importance_sampling_clip_max if corrected else None,
            )
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"MSSRConfig, {'.'.join(map(str, first['loc'])) or 'tracker'}: {first['msg']}") from None

    def _responses_per_rank(self) -> int:
        """Return the group size for GRPOConfig's checks, which must be two or more and divide the generation batch.

        Raises:
            UserError: a generation batch of one response per rank, whose normalised advantage would be 0.
        """
        if self.generation_batch_size is not None:
            responses = self.generation_batch_size
        else:
            steps = self.steps_per_generation or self.gradient_accumulation_steps
            responses = self.per_device_train_batch_size * steps
        if responses < 2:
            raise UserError(
                "MSSRConfig.per_device_train_batch_size 1 without gradient accumulation: advantages are normalised over "
                "the generation batch; set generation_batch_size, over all ranks, to 2 or more"
            )
        return responses
