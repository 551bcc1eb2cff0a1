"""The DeepSpeed engine around the policy: score a batch, update on a batch, save and load."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mssr.batch import Prompt, RolloutBatch
from mssr.config import ModelConfig, OptimizerConfig
from mssr.distributed import World
from mssr.policy.loading import load_policy
from mssr.policy.model import Policy
from mssr.policy.packing import MicroBatch, pack, plan_micro_batches
from mssr.policy.zero3 import PERSISTENT_NUMEL, load_partitioned_policy
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
    """

    metrics: dict[str, float]
    logp: Tensor
    grad_norm: float
    lr: float


class PolicyEngine:
    """Owns the policy's parameters and their optimiser state on this rank.

    Every method is to be called on all ranks, with whatever rows each has (`score_nothing` for none): gradients are
    summed over ranks, and under ZeRO-3 each layer's parameters are gathered for every pass.
    """

    def __init__(
        self,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        world: World,
        *,
        micro_batch_tokens: int,
        zero_stage: int,
        temperature: float,
        total_updates: int,
    ) -> None:
        self.world = world
        self._token_budget = micro_batch_tokens
        self._temperature = temperature
        dtype = resolve_dtype(model.dtype, world)
        settings = _deepspeed_settings(optimizer, zero_stage, dtype)
        checkpointing = model.gradient_checkpointing
        if zero_stage == 3:
            self.policy = load_partitioned_policy(
                model.path, dtype, world, settings, gradient_checkpointing=checkpointing
            )
        else:
            self.policy = load_policy(model.path, dtype, gradient_checkpointing=checkpointing).to(world.device)
        self.policy.train()  # as loaded it is in eval mode, where gradient checkpointing does nothing
        self._engine, self._clipping = _deepspeed_engine(self.policy, optimizer, settings, total_updates)

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
                logp[micro_batch.row.cpu(), micro_batch.column.cpu()] = scored.cpu()
        return logp

    def score_nothing(self) -> None:
        """`score` of a rank that has no rows while others may have."""
        if self.policy.partitioned:
            self.score(IDLE.rows(0, 0))

    def update(self, batch: RolloutBatch, config: PolicyLossConfig) -> UpdateStats:
        """One optimiser step on the batch: forward and backward of every micro-batch, clipping, AdamW.

        The loss is the mean over all response tokens of the step, on all ranks, however they were cut; masked responses
        are no part of it, and their log-probs are reported as 0.
        """
        tokens = max(1, int(self.world.sum(batch.loss_mask.sum())))
        # DeepSpeed averages gradients over ranks; a sum over the global token count needs that undone.
        normalizer = tokens / self.world.size
        logp = torch.zeros_like(batch.logp)
        outputs = []
        for rows in self._agreed_plan(batch):
            micro_batch = self._pack(batch, rows)
            if rows and batch.masked is not None:
                micro_batch.target[batch.masked[micro_batch.row.cpu()].to(micro_batch.target.device)] = IGNORED
            out = self._engine(
                micro_batch,
                self._temperature,
                config=config,
                normalizer=normalizer,
                **_loss_inputs(batch if rows else IDLE, micro_batch),
            )
            self._engine.backward(out.loss)
            outputs.append(out.metrics)
            if rows:
                logp[micro_batch.row.cpu(), micro_batch.column.cpu()] = out.logp.cpu()
        lr = self._engine.get_lr()[0]
        self._engine.step()
        grad_norm = self._clipping.norm if self._clipping else float(self._engine.get_global_grad_norm())
        return UpdateStats(mean_metrics(outputs, self.world), logp, grad_norm, lr)

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
        optimizer = self._engine.optimizer.optimizer
        if masters:
            for master in (parameter for group in optimizer.param_groups for parameter in group["params"]):
                master.data = master.data.to(device)
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor) and value.ndim:  # AdamW's step counts stay on the CPU
                    value.data = value.data.to(device)

    def save(self, folder: Path) -> None:
        """Weights, optimiser and schedule; every rank writes its share."""
        self._engine.save_checkpoint(str(folder), tag="engine", save_latest=False)

    def load(self, folder: Path) -> None:
        loaded, _ = self._engine.load_checkpoint(str(folder), tag="engine")
        if loaded is None:
            raise FileNotFoundError(f"{folder}/engine: DeepSpeed found no checkpoint")

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


def resolve_dtype(name: str, world: World) -> torch.dtype:
    """The parameters' dtype; "auto" is bfloat16 on a GPU (fp32 master weights in the optimiser), float32 on a CPU."""
    if name == "auto":
        name = "bfloat16" if world.device.type == "cuda" else "float32"
    return getattr(torch, name)


def _deepspeed_settings(config: OptimizerConfig, zero_stage: int, dtype: torch.dtype) -> dict:
    plain = zero_stage == 0 and dtype == torch.float32
    zero = {"stage": zero_stage, "overlap_comm": False}
    if zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = PERSISTENT_NUMEL
    return {
        # Micro-batches are ours: we call step() at the end of an optimiser step, whatever number of backwards it had.
        "managed_gradient_accumulation": False,
        "train_micro_batch_size_per_gpu": 1,
        # DeepSpeed clips plain float32 gradients without telling the norm; there we clip, in a hook on AdamW's step.
        "gradient_clipping": 0.0 if plain else config.grad_clip,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


def _deepspeed_engine(policy: Policy, config: OptimizerConfig, settings: dict, total_updates: int):
    """(engine, the clipping that is ours or None where DeepSpeed's own is used)."""
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=False
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: lr_factor(config, update, total_updates))
    clipping = None if settings["gradient_clipping"] else Clipping(optimizer, parameters, config.grad_clip)
    import deepspeed  # reads DS_ACCELERATOR when imported, which start_world sets

    engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, lr_scheduler=schedule, config=settings)
    return engine, clipping


class Clipping:
    """Clips the global gradient norm when the optimiser steps. norm: the last one, before clipping."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], limit: float) -> None:
        self.norm = 0.0
        self._parameters, self._limit = parameters, limit
        optimizer.register_step_pre_hook(self._clip)

    def _clip(self, *_) -> None:
        self.norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self._limit))


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


def lr_factor(config: OptimizerConfig, update: int, total_updates: int) -> float:
    """What the learning rate is multiplied by on update 0, 1, ...: 1 from the first one unless a warm-up is asked for."""
    warm = min(1.0, (update + 1) / config.warmup_updates) if config.warmup_updates else 1.0
    if config.schedule == "constant":
        return warm
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, update / total_updates)))


def _loss_inputs(batch: RolloutBatch, micro_batch: MicroBatch) -> dict[str, Tensor | None]:
    """The batch's per-sequence and per-token values in the micro-batch's token order, each [N]."""
    row, column = micro_batch.row.cpu(), micro_batch.column.cpu()

    def tokens(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[row, column].to(micro_batch.target.device)

    return {
        "advantage": batch.advantage[row].to(micro_batch.target.device),
        "old_logp": tokens(batch.old_logp),
        "ref_logp": tokens(batch.ref_logp),
        "rollout_logp": tokens(batch.logp),
    }


def _lengths(batch: RolloutBatch) -> list[int]:
    return [len(prompt.token_ids) + length for prompt, length in zip(batch.prompts, batch.lengths.tolist())]
