"""`algorithm.*`: advantages, value tracker and loss."""

from typing import Any, Literal

from pydantic import Field, model_validator

from mssr.algorithms.advantages import ALGORITHMS
from mssr.config.section import Section


class TrackerConfig(Section):
    """Settings of the per-prompt baseline, see `mssr.algorithms.value_tracker`."""

    preset: Literal["default", "reference"] = Field(
        "default", description="default: smoothed start, forgetting by drift; reference: the rules of the authors' code"
    )
    n_init: int = Field(
        1, ge=0, description="rollouts per prompt before training starts; 0: every prompt starts at v = 0.5"
    )
    rho_min: float = Field(0.875, gt=0, lt=1, description="strongest forgetting; initial weight N0 = 1 / (1 - rho_min)")
    rho_max: float = Field(0.96, gt=0, lt=1, description="weakest forgetting")
    half_life: float = Field(0.06, gt=0, description="drift, in nats per token, that halves the memory")
    drift: Literal["prompt", "batch"] = Field(
        "prompt",
        description="prompt: rescore the previous response of each prompt; batch: mean of the last step, no extra pass",
    )

    @model_validator(mode="after")
    def _rho_ordered(self):
        if self.rho_min > self.rho_max:
            raise ValueError(f"rho_min {self.rho_min} is larger than rho_max {self.rho_max}")
        return self


class AlgorithmConfig(Section):
    name: Literal[tuple(ALGORITHMS)] = Field(
        "mssr",
        description="baseline from the value tracker (mssr, mvsr, spo), from the group (grpo, rloo) or none (reinforce_pp)",
    )
    tracker: TrackerConfig = TrackerConfig()
    prompt_sampling: Literal["uniform", "prioritised"] = Field(
        "uniform", description="prioritised: prompts of uncertain value are drawn more often (default of spo)"
    )
    dynamic_sampling: int = Field(
        0,
        ge=0,
        description="DAPO: rounds in which groups whose responses all get the same reward are replaced; 0: off",
    )
    entropy_alpha: float = Field(0.4, ge=0, description="strength of the entropy shaping (arXiv 2506.14758)")
    entropy_kappa: float = Field(2.0, gt=0, description="the shaping term is at most |A| / kappa")
    entropy_source: Literal["exact", "sampled_token"] = Field(
        "exact", description="exact: full-vocabulary entropy; sampled_token: the authors' -p log p proxy"
    )
    clip_low: float = Field(0.2, gt=0, lt=1, description="the ratio is clipped to [1 - clip_low, 1 + clip_high]")
    clip_high: float = Field(0.3, gt=0, description="see clip_low")
    dual_clip: float | None = Field(
        3.0, gt=1, description="where A' < 0 the objective is at least dual_clip * A'; null: off"
    )
    kl_coef: float = Field(0.01, ge=0, description="weight of the KL term; 0: no reference model is loaded")
    kl_to: Literal["reference", "text_only"] = Field(
        "reference",
        description="reference policy: the frozen initial policy, or the policy at the start of the step with blank images",
    )
    entropy_coef: float = Field(0.0, ge=0, description="weight of an entropy bonus in the loss")
    old_logp: Literal["rollout", "recompute"] = Field(
        "rollout",
        description="rollout: the sampler's log-probs, no extra pass; recompute: one trainer pass, corrected by tis_cap",
    )
    tis_cap: float | None = Field(
        2.0, gt=0, description="with old_logp recompute: cap of the truncated importance weight; null: no correction"
    )

    @property
    def rescores_responses(self) -> bool:
        """Whether a prompt's drift is measured by a pass over its previous response."""
        return ALGORITHMS[self.name].tracked and self.tracker.preset == "default" and self.tracker.drift == "prompt"

    @model_validator(mode="before")
    @classmethod
    def _spo_prioritises(cls, values: Any) -> Any:
        name = values.get("name") if isinstance(values, dict) else None
        if isinstance(name, str) and name in ALGORITHMS and ALGORITHMS[name].prioritised:
            return {"prompt_sampling": "prioritised"} | values
        return values
