"""The DeepSpeed engine around the policy: score a batch, update on a batch, save and load."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mssr.batch import Prompt, RolloutBatch
from mssr.config import ModelConfig, OptimizerConfig, TrainConfig
from mssr.config.resolve import dtype_name
from mssr.distributed import World
from mssr.errors import UserError
from mssr.policy.deepspeed_settings import deepspeed_settings
from mssr.policy.loading import load_policy
from mssr.policy.model import Policy
from mssr.policy.optimizer import make_optimizer
from mssr.policy.packing import MicroBatch, pack, plan_micro_batches
from mssr.policy.pieces import SavedPieces, load_pieces, own_pieces, save_pieces, shapes, torch_optimizer
from mssr.policy.zero3 import load_partitioned_policy
from mssr.stopwatch import Stopwatch
from mssr_kernels import PolicyLossConfig, PolicyMetrics

IGNORED = -100

# One row of text, two tokens: what a rank computes while others have rows left.
IDLE = RolloutBatch(
    prompts=(Prompt("", -1, "", "", None, torch.zeros(1, dtype=torch.int64), None, None, ()),),
    tokens=torch.zeros(1, 1, dtype=torch.int64),
    mask=torch.ones(1, 1, dtype=torch.bool),
    logp=torch.zeros(1, 1),
    truncated=torch.zeros(1, dtype=torch.bool),
    advantage=torch.zeros(1),
    old_logp=torch.zeros(1, 1),
    ref_logp=torch.zeros(1, 1),
)


@dataclass(frozen=True, eq=False)
class UpdateStats:
    """One optimiser step, over all ranks.

    metrics: means over the step's response tokens, by name.
    logp: [B, R] float32, this rank's rows: log-probs under the weights the step started from.
    grad_norm: global norm before clipping. lr: the rate the step used.
    slots: token positions that this rank's attention computed, padding included.
    applied: False where the weights stayed: the gradient was not finite, or the update was not accepted.
    """

    metrics: dict[str, float]
    logp: Tensor
    grad_norm: float
    lr: float
    slots: int = 0
    applied: bool = True


class PolicyEngine:
    """Owns the policy's parameters and their optimiser state on this rank.

    Every method is to be called on all ranks, with whatever rows each has (`score_nothing` for none): gradients are
    summed over ranks, and under ZeRO-3 each layer's parameters are gathered for every pass.
    """

    def __init__(
        self,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        train: TrainConfig,
        world: World,
        *,
        temperature: float,
        total_updates: int,
    ) -> None:
        """total_updates: what the learning rate's schedule runs over.

        Raises:
            UserError: the model cannot be loaded, or not be trained with these settings.
        """
        self.world = world
        self._token_budget = train.micro_batch_tokens
        self._vocab_drop_tol = train.vocab_drop_tol
        self._temperature = temperature
        dtype = getattr(torch, dtype_name(model.dtype, world.device.type))
        if dtype == torch.bfloat16 and train.zero_stage == 0:
            raise UserError(
                "train.zero_stage 0 with bfloat16 (model.dtype) is an optimizer of DeepSpeed's that checkpoints cannot read; "
                "set train.zero_stage=1, on one rank the same memory"
            )
        settings = deepspeed_settings(optimizer, train, dtype)
        if train.zero_stage == 3:
            self.policy = load_partitioned_policy(model.path, dtype, world, settings, model)
        else:
            self.policy = load_policy(model.path, dtype, model, world.device).to(world.device)
        self.policy.train()  # as loaded it is in eval mode, where gradient checkpointing does nothing
        self._trained = {name: weight for name, weight in self.policy.model.named_parameters() if weight.requires_grad}
        self._engine = _deepspeed_engine(self.policy, list(self._trained.values()), optimizer, settings, total_updates)

    @torch.no_grad()
    def score(self, batch: RolloutBatch, policy: Policy | None = None) -> Tensor:
        """[B, R] float32: log-prob of each response token under the current weights, or under another policy's."""
        policy = policy or self.policy
        logp = torch.zeros_like(batch.logp)
        plan = self._agreed_plan(batch) if policy.partitioned else self._own_plan(batch)
        for rows in plan:
            micro_batch = self._pack(batch, rows)
            scored = policy(micro_batch, self._temperature).logp
            if rows:
                logp[micro_batch.row, micro_batch.column] = scored.cpu()
        return logp

    def score_nothing(self) -> None:
        """`score` of a rank that has no rows while others may have."""
        if self.policy.partitioned:
            self.score(IDLE.rows(0, 0))

    def update(
        self,
        batch: RolloutBatch,
        config: PolicyLossConfig,
        *,
        accept: Callable[[Tensor], bool] | None = None,
        clock: Stopwatch | None = None,
    ) -> UpdateStats:
        """One optimiser step on the batch: forward and backward of every micro-batch, clipping, AdamW.

        The loss is the mean over all response tokens of the step, on all ranks, however they were cut; masked responses
        are no part of it, and their log-probs are reported as 0.

        accept: given this rank's [B, R] log-probs before the weights move, says whether they may; the same on all ranks.
        clock: gets the phases forward_backward and optimizer.
        """
        clock = clock or Stopwatch(self.world.device)
        with clock("forward_backward"):
            metrics, logp, slots = self._accumulate(batch, config, accept)
        with clock("optimizer"):
            lr = self._engine.get_lr()[0]
            self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        return UpdateStats(mean_metrics(metrics, self.world), logp, norm, lr, slots, self._engine.was_step_applied())

    def _accumulate(
        self, batch: RolloutBatch, config: PolicyLossConfig, accept: Callable[[Tensor], bool] | None
    ) -> tuple[list[PolicyMetrics], Tensor, int]:
        """Gradients of the whole batch -> (each micro-batch's metrics, [B, R] log-probs, slots of attention)."""
        tokens = max(1, int(self.world.sum(batch.loss_mask.sum())))
        # DeepSpeed averages gradients over ranks; a sum over the global token count needs that undone.
        normalizer = tokens / self.world.size
        logp = torch.zeros_like(batch.logp)
        metrics, slots = [], 0
        plan = self._agreed_plan(batch)
        for number, rows in enumerate(plan, start=1):
            micro_batch = self._pack(batch, rows)
            if rows and batch.masked is not None:
                micro_batch.target[batch.masked[micro_batch.row].to(micro_batch.target.device)] = IGNORED
            out = self._engine(
                micro_batch,
                self._temperature,
                config=config,
                normalizer=normalizer,
                vocab_drop_tol=self._vocab_drop_tol,
                **_loss_inputs(batch if rows else IDLE, micro_batch, config),
            )
            if rows:
                logp[micro_batch.row, micro_batch.column] = out.logp.cpu()
            refused = number == len(plan) and accept is not None and not accept(logp)
            # A gradient that is not finite is what makes DeepSpeed leave an update out, with all the clearing up.
            self._engine.backward(out.loss * torch.nan if refused else out.loss)
            metrics.append(out.metrics)
            slots += self.policy.attention_slots(micro_batch)
        return metrics, logp, slots

    def imitate(self, batch: RolloutBatch) -> UpdateStats:
        """One supervised step: raise the log-prob of every response token alike.

        Cross-entropy is the on-policy loss at advantage 1: its gradient is -d logp (ratio 1, nothing to clip or shape).
        """
        batch_of_ones = replace(batch, advantage=torch.ones(len(batch)))
        return self.update(batch_of_ones, PolicyLossConfig(entropy_alpha=0.0, dual_clip=None))

    @contextmanager
    def optimizer_offloaded(self) -> Iterator[None]:
        """In here master weights and moments are in host memory, to make room for a sampler; ZeRO 1, 2 and 3."""
        from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum

        # Up to ZeRO-2 DeepSpeed keeps views of the masters that it must let go of itself. What else it can move it can move
        # for its own fused Adam only, so the rest is by hand.
        by_hand = self._engine.zero_optimization_stage() == 3
        host = torch.device("cpu")
        if not by_hand:
            pinned = self.world.device.type == "cuda"
            self._engine.offload_states(include=[OffloadStateTypeEnum.hp_params], pin_memory=pinned)
        self._move_optimizer(host, masters=by_hand)
        try:
            yield
        finally:
            if not by_hand:
                self._engine.reload_states()
            self._move_optimizer(self.world.device, masters=by_hand)

    def _move_optimizer(self, device: torch.device, *, masters: bool) -> None:
        """AdamW's moments, and its parameters, DeepSpeed's fp32 masters, if asked for."""
        if masters:  # AdamW itself has no list of them between two steps
            for master in self._engine.optimizer.fp32_partitioned_groups_flat:
                master.data = master.data.to(device)
        for state in torch_optimizer(self._engine).state.values():
            for value in state.values():
                if isinstance(value, Tensor) and value.ndim:  # step counts stay where they are
                    value.data = value.data.to(device)

    def state_dict(self) -> dict:
        """What belongs to no rank: the trained parameters' shapes by name, and the updates made."""
        return {"shapes": shapes(self._trained), "updates": self._engine.lr_scheduler.last_epoch}

    def own_state(self) -> dict[str, dict]:
        """Copies, in host memory, of this rank's part of the masters and moments; any layout can load all parts."""
        return save_pieces(own_pieces(self._engine, self._trained, self.world))

    def load(self, state: dict, saved: SavedPieces) -> None:
        """Continues from `state_dict` and every rank's `own_state`, under whatever ZeRO stage and ranks they were saved.

        The learning rate goes on where the schedule was, at the rate that is configured now.

        Raises:
            UserError: they are of another model.
        """
        here, there = shapes(self._trained), state["shapes"]
        for name in sorted(here.keys() | there.keys()):
            if here.get(name) != there.get(name):
                raise UserError(
                    f"the checkpoint's run trained {name} {there.get(name, 'not at all')}, this one "
                    f"{here.get(name, 'does not')}; resume with its model.path, model.lora and model.train_vision"
                )
        load_pieces(self._engine, self._trained, saved, state["updates"])
        schedule = self._engine.lr_scheduler
        rates = [rate * factor(state["updates"]) for rate, factor in zip(schedule.base_lrs, schedule.lr_lambdas)]
        for group, rate in zip(torch_optimizer(self._engine).param_groups, rates):
            group["lr"] = rate
        schedule.load_state_dict(schedule.state_dict() | {"last_epoch": state["updates"], "_last_lr": rates})

    def _pack(self, batch: RolloutBatch, rows: list[int]) -> MicroBatch:
        """The rows, packed; of no rows an idle token, so that the rank takes part in the collectives.

        Raises:
            ValueError: a response holds a token that the policy never samples; its log-prob is -inf, and the loss NaN.
        """
        forbidden = torch.isin(batch.tokens[rows], torch.tensor(self.policy.forbidden_token_ids)) & batch.mask[rows]
        if forbidden.any():
            prompt = batch.prompts[rows[int(forbidden.any(1).nonzero()[0])]]
            raise ValueError(f"the response to row {prompt.row} holds an image or video pad, which has probability 0")
        packed = (batch, rows) if rows else (IDLE, [0])
        micro_batch = pack(*packed, self.policy.prompt_positions, self.policy.image_token_id, self.world.device)
        if not rows:
            micro_batch.target.fill_(IGNORED)
        return micro_batch

    def _own_plan(self, batch: RolloutBatch, at_least: int = 1) -> list[list[int]]:
        return plan_micro_batches(_lengths(batch), self._token_budget, at_least=at_least)

    def _agreed_plan(self, batch: RolloutBatch) -> list[list[int]]:
        """Micro-batches, the same number on every rank.

        The loop's condition is the same on every rank too: one that left early would miss the next round's collective.
        """
        at_least, agreed = 0, 1
        while at_least != agreed:
            at_least = agreed
            plan = self._own_plan(batch, at_least)
            agreed = int(self.world.max(torch.tensor(len(plan))))
        return plan


def _deepspeed_engine(
    policy: Policy, parameters: list[torch.nn.Parameter], config: OptimizerConfig, settings: dict, total_updates: int
):
    guarded = settings["gradient_clipping"] == 0
    optimizer, schedule = make_optimizer(config, parameters, total_updates, guarded=guarded)
    import deepspeed  # reads DS_ACCELERATOR when imported, which start_world sets

    engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, lr_scheduler=schedule, config=settings)
    return engine


def mean_metrics(parts: list[PolicyMetrics], world: World) -> dict[str, float]:
    """The fused loss's sums over micro-batches and ranks, as means over tokens."""
    names = [name for name in PolicyMetrics._fields if name.endswith("_sum")]
    sums = torch.stack(
        [torch.stack([getattr(part, name) for name in ("rows", *names)]).double() for part in parts]
    ).sum(0)
    rows, *totals = world.sum(sums).tolist()
    means = {name.removesuffix("_sum"): total / max(rows, 1) for name, total in zip(names, totals)}
    means["clip_fraction"] = means.pop("clipped")
    return means | {"ratio_max": float(world.max(torch.stack([part.ratio_max for part in parts]).max()))}


def _loss_inputs(batch: RolloutBatch, micro_batch: MicroBatch, config: PolicyLossConfig) -> dict[str, Tensor | None]:
    """The batch's per-sequence and per-token values in the micro-batch's token order, each [N].

    The sampler's own log-probs go in for the correction (TIS) alone. Where they do, shaping by the sampled token goes by
    them; without the correction by old_logp, as its authors' does.
    """
    row, column = micro_batch.row, micro_batch.column

    def tokens(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[row, column].to(micro_batch.target.device)

    return {
        "advantage": batch.advantage[row].to(micro_batch.target.device),
        "old_logp": tokens(batch.old_logp),
        "ref_logp": tokens(batch.ref_logp),
        "rollout_logp": None if config.tis_cap is None else tokens(batch.logp),
    }


def _lengths(batch: RolloutBatch) -> list[int]:
    return [len(prompt.token_ids) + length for prompt, length in zip(batch.prompts, batch.lengths.tolist())]
