"""MSSR in TRL: one generation per prompt, a value tracker as baseline, entropy-shaped advantages (arXiv 2512.18215).

from mssr.integrations.trl.single_rollout import MSSRConfig, MSSRTrainer

MSSRTrainer(model, reward_funcs=reward, args=MSSRConfig(...), train_dataset=dataset).train()
"""

import inspect
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mssr.algorithms.advantages import Outcomes, single_rollout
from mssr.algorithms.value_tracker import ValueTracker, response_drift
from mssr.config.resolve import policy_loss
from mssr.errors import UserError
from mssr.integrations.trl.fused_head import PolicyLossOutput, PolicyRows
from mssr.integrations.trl.policy_metrics import policy_metrics
from mssr.integrations.trl.prompt_key import prompt_key
from mssr.integrations.trl.single_rollout_config import MSSRConfig
from mssr.integrations.trl.tracker_file import load_tracker, save_tracker
from mssr.integrations.trl.trainers import FusedGRPOTrainer

__all__ = ["MSSRConfig", "MSSRTrainer"]


class MSSRTrainer(FusedGRPOTrainer):
    """TRL's GRPOTrainer with MSSR's advantages and loss; generation, rewards, logging and the loop are TRL's.

        A  = reward - v(prompt), normalised over the generation batch of all ranks
        A' = A + min(alpha * H, |A| / kappa), token by token, H the policy's exact entropy

    The forward pass computes the loss and its gradients (`mssr_kernels.linear_policy_loss`): 6 NDV of matmul work for
    the head instead of 8. A prompt is recognised by its column `id`, else by its content. Every rank holds the whole
    tracker. rho follows the drift of the last generation batch during its updates, without rescoring. A response that no
    reward function scored (None) is not trained on and does not count as a visit.

    Metrics are GRPOTrainer's without `frac_reward_zero_std`, which needs a group, and in addition:
    clip_ratio/dual_mean, clip_ratio/capped_mean, shaping/mean, tracker/value_mean, tracker/rho, tracker/drift.

    Raises:
        UserError: args is not an MSSRConfig, a reward is not in [0, 1], or a checkpoint has no tracker, or a damaged one.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, MSSRConfig):
            raise UserError(f"MSSRTrainer: args is a {type(self.args).__name__}; pass an MSSRConfig")
        algorithm = self.args.algorithm()
        self.loss = policy_loss(algorithm)
        self.tracker = ValueTracker(algorithm.tracker)
        self._moved = torch.zeros(2)  # sum of the responses' drifts since the last generation, and their count
        self._visit: tuple[list[str], Tensor] | None = None  # keys and rewards [B] of the current batch, all ranks

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.environments is not None and any(row.get("id") is None for row in inputs):
            raise UserError("MSSRTrainer: prompts from an environment need a column `id`")
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        total[rewards.isnan().all(dim=1)] = torch.nan
        self._visit = gather_object([prompt_key(row) for row in inputs]), total.float().cpu()
        return rewards

    def _generate_and_score_completions(self, inputs):
        mode = "train" if self.model.training else "eval"
        output = super()._generate_and_score_completions(inputs)
        keys, reward = self._visit
        advantage = self._advantages(keys, reward)
        first = self.accelerator.process_index * len(inputs)
        output["advantages"] = advantage[first : first + len(inputs)].to(output["advantages"].device)

        logged = self._logs["advantages"]  # TRL has logged the advantages of groups of one
        for _ in range(min(len(logged), len(advantage))):
            logged.pop()
        logged.extend(advantage.tolist())
        self._metrics[mode].pop("frac_reward_zero_std", None)
        if mode == "train":
            self._track(keys, reward)
        return output

    def _advantages(self, keys: list[str], reward: Tensor) -> Tensor:
        """Advantages of all ranks, [B]; 0 for responses without a reward, which the normalisation leaves out."""
        outcomes = Outcomes(
            reward=reward,
            success=reward,
            graded=~reward.isnan(),
            value=self.tracker.values(keys),
            lengths=torch.ones(len(reward), dtype=torch.int64),
            group=1,
        )
        return single_rollout(outcomes)

    def _track(self, keys: list[str], reward: Tensor) -> None:
        """Update the tracker with all ranks' visits in rank order, so that every rank holds the same."""
        scored = [(key, value) for key, value in zip(keys, reward.tolist()) if value == value]
        moved = self._moved_on_all_ranks()
        drift = moved[0] / moved[1].clamp(min=1)
        rho = self.tracker.rho(drift)
        values = self.tracker.values([key for key, _ in scored])
        self.tracker.update([key for key, _ in scored], torch.tensor([value for _, value in scored]), rho)
        self._moved = torch.zeros(2)
        for name, value in {"value_mean": values.mean(), "rho": rho, "drift": drift}.items():
            self._metrics["train"][f"tracker/{name}"].append(float(value))

    def _moved_on_all_ranks(self) -> Tensor:
        return self.accelerator.reduce(self._moved.to(self.accelerator.device), reduction="sum").cpu()

    def _compute_loss(self, model, inputs):
        mode = "train" if self.model.training else "eval"
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        rows, outputs = self._policy_rows(inputs, mask.bool(), mode), []

        def scored(**kwargs) -> PolicyLossOutput:  # the model, which also computes the loss of the rows
            outputs.append(model(**kwargs, policy_rows=rows))
            return outputs[-1]

        given = inspect.signature(super()._get_per_token_logps_and_entropies).parameters  # the model's own inputs
        logp, _, aux_loss = self._get_per_token_logps_and_entropies(
            scored,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            mask.shape[1],
            compute_aux_loss=self.aux_loss_enabled,
            **{name: value for name, value in inputs.items() if name in given},
        )
        (output,) = outputs
        loss = output.loss
        if self.aux_loss_enabled:
            steps = self.current_gradient_accumulation_steps if mode == "train" else 1
            loss = loss + self.router_aux_loss_coef * aux_loss / steps
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather_for_metrics(aux_loss).mean().item())
        if mode == "train":
            self._observe_drift(inputs, logp, mask.bool())
        for name, value in policy_metrics(output, mask, self.loss, self.accelerator).items():
            self._metrics[mode][name].append(value)
        return loss

    def _policy_rows(self, inputs, mask: Tensor, mode: str) -> PolicyRows:
        """Use TRL's `dapo` normalizer: tokens of an optimiser step over all ranks, whose gradients are averaged."""
        normalizer = inputs["num_items_in_batch"].clamp(min=1).float() / self.accelerator.num_processes
        if mode == "train":
            normalizer = normalizer * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        config = self.loss
        old_logp, rollout_logp = inputs.get("old_per_token_logps"), None
        if config.tis_cap is not None:  # a token that vLLM could not score is not corrected
            sampled = inputs["sampling_per_token_logps"]
            rollout_logp = torch.where(sampled.isnan(), old_logp, sampled)
        return PolicyRows(
            mask,
            advantage=inputs["advantages"][:, None].expand(mask.shape).float(),
            old_logp=old_logp,
            ref_logp=inputs.get("ref_per_token_logps"),
            rollout_logp=rollout_logp,
            normalizer=normalizer,
            config=config,
        )

    def _observe_drift(self, inputs, logp: Tensor, mask: Tensor) -> None:
        sampled = inputs.get("sampling_per_token_logps", inputs.get("old_per_token_logps"))
        if sampled is None:  # with one update per batch TRL does not score the old policy
            return
        drift = response_drift(logp, torch.where(sampled.isnan(), logp, sampled), mask)[mask.any(1)]
        self._moved += torch.tensor([float(drift.sum()), len(drift)])

    def _save_checkpoint(self, model, trial) -> None:
        state = {"tracker": self.tracker.state_dict(), "moved": self._moved_on_all_ranks()}
        if self.args.should_save:  # first: in the end the Trainer removes older checkpoints
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            save_tracker(state, Path(self._get_output_dir(trial=trial)) / folder)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        state = load_tracker(Path(checkpoint))
        self.tracker.load_state_dict(state["tracker"])
        self._moved = state["moved"] if self.accelerator.is_main_process else torch.zeros(2)
