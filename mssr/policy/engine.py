"""The DeepSpeed engine of the policy: score sequences, accumulate gradients, step or discard, save and load."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from mssr.batch import Sequences
from mssr.config.resolve import dtype_name
from mssr.config.schema import ModelConfig, OptimizerConfig, TrainConfig
from mssr.distributed import World
from mssr.errors import UserError
from mssr.policy.deepspeed_settings import deepspeed_settings
from mssr.policy.loading import load_policy
from mssr.policy.loss import Loss
from mssr.policy.model import Policy
from mssr.policy.optimizer import make_optimizer
from mssr.policy.packing import IGNORED, MicroBatch, idle_micro_batch, pack, plan_micro_batches
from mssr.policy.pieces import SavedPieces, load_pieces, own_pieces, save_pieces, shapes, torch_optimizer
from mssr.policy.sharding import load_partitioned_policy
from mssr.stopwatch import Stopwatch
from mssr_kernels import PolicyMetrics


@dataclass(frozen=True, eq=False)
class Accumulated:
    """Outputs of the passes that accumulated a batch's gradients.

    metrics: means over the response tokens of all ranks, by name.
    logp: [B, R] float32, this rank's log-probs under the current weights; 0 where a token is not in the loss.
    slots: token positions that attention computed on this rank, padding included.
    """

    metrics: dict[str, float]
    logp: Tensor
    slots: int = 0


@dataclass(frozen=True, eq=False)
class UpdateStats(Accumulated):
    """One optimiser step, over all ranks.

    grad_norm: global norm before clipping. lr: learning rate of the step.
    applied: False if the weights did not change: the gradient was not finite, or it was discarded.
    """

    grad_norm: float = 0.0
    lr: float = 0.0
    applied: bool = True


class PolicyEngine:
    """Owns the policy's parameters and their optimiser state on this rank.

        accumulated = engine.accumulate(batch, loss)
        stats = engine.step(accumulated) or engine.discard(accumulated)

    Call every method on all ranks, each with its own rows, even none: gradients are summed over ranks, and ZeRO-3 gathers
    the parameters of each layer for every pass.
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
        """total_updates: length of the learning rate schedule.

        Raises:
            UserError: the model cannot be loaded, or cannot be trained with these settings.
        """
        self.world = world
        self._token_budget = train.micro_batch_tokens
        self._vocab_drop_tol = train.vocab_drop_tol
        self._temperature = temperature
        dtype = getattr(torch, dtype_name(model.dtype, world.device.type))
        if dtype == torch.bfloat16 and train.zero_stage == 0:
            raise UserError(
                "train.zero_stage 0 with bfloat16 (model.dtype) uses a DeepSpeed optimizer that cannot be checkpointed; "
                "set train.zero_stage=1, which needs the same memory on one rank"
            )
        settings = deepspeed_settings(optimizer, train, dtype)
        if train.zero_stage == 3:
            self.policy = load_partitioned_policy(model.path, dtype, world, settings, model)
        else:
            self.policy = load_policy(model.path, dtype, model, world.device).to(world.device)
        self.policy.train()  # it is loaded in eval mode, where gradient checkpointing is off
        self._trained = {name: weight for name, weight in self.policy.model.named_parameters() if weight.requires_grad}
        guarded = settings["gradient_clipping"] == 0
        adamw, schedule = make_optimizer(optimizer, list(self._trained.values()), total_updates, guarded=guarded)
        import deepspeed  # reads DS_ACCELERATOR when imported, which start_world sets

        self._engine, *_ = deepspeed.initialize(
            model=self.policy, optimizer=adamw, lr_scheduler=schedule, config=settings
        )

    @torch.no_grad()
    def score(self, batch: Sequences, policy: Policy | None = None) -> Tensor:
        """Return log-probs of the response tokens, [B, R] float32, under the current weights or another policy's."""
        policy = policy or self.policy
        logp = torch.zeros(batch.tokens.shape)
        plan = self._agreed_plan(batch) if policy.partitioned else self._own_plan(batch)
        for rows in plan:
            micro_batch = self._pack(batch, rows)
            scored = policy(micro_batch, self._temperature).logp
            logp[micro_batch.row, micro_batch.column] = scored[: len(micro_batch.row)].cpu()
        return logp

    def update(self, batch: Sequences, loss: Loss, clock: Stopwatch | None = None) -> UpdateStats:
        """Take one optimiser step on the batch: `accumulate`, then `step`."""
        return self.step(self.accumulate(batch, loss, clock), clock)

    def accumulate(self, batch: Sequences, loss: Loss, clock: Stopwatch | None = None) -> Accumulated:
        """Compute the gradients of the whole batch, in micro-batches; `step` or `discard` must follow.

        The loss is the mean over all response tokens of all ranks, whatever the micro-batches.
        clock: gets the phase forward_backward.
        """
        clock = clock or Stopwatch(self.world.device)
        with clock("forward_backward"):
            counted = loss.mask(batch)
            tokens = max(1, int(self.world.sum(counted.sum())))
            # DeepSpeed averages gradients over ranks; a sum over the global token count needs that undone.
            normalizer = tokens / self.world.size
            logp = torch.zeros(batch.tokens.shape)
            metrics, slots = [], 0
            for rows in self._agreed_plan(batch):
                micro_batch = self._pack(batch, rows)
                place = micro_batch.row, micro_batch.column
                if rows:
                    micro_batch.target[~counted[place].to(micro_batch.target.device)] = IGNORED
                out = self._engine(
                    micro_batch,
                    self._temperature,
                    config=loss.config,
                    normalizer=normalizer,
                    vocab_drop_tol=self._vocab_drop_tol,
                    **loss.inputs(batch, micro_batch),
                )
                logp[place] = out.logp[: len(micro_batch.row)].cpu()
                self._engine.backward(out.loss)
                metrics.append(out.metrics)
                slots += self.policy.attention_slots(micro_batch)
        return Accumulated(mean_metrics(metrics, self.world), logp, slots)

    def step(self, accumulated: Accumulated, clock: Stopwatch | None = None) -> UpdateStats:
        """Clip the accumulated gradients and apply them by AdamW, unless they are not finite.

        clock: gets the phase optimizer.
        """
        clock = clock or Stopwatch(self.world.device)
        with clock("optimizer"):
            lr = self._engine.get_lr()[0]
            self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        return UpdateStats(**vars(accumulated), grad_norm=norm, lr=lr, applied=self._engine.was_step_applied())

    def discard(self, accumulated: Accumulated, clock: Stopwatch | None = None) -> UpdateStats:
        """Drop the accumulated gradients; weights, moments and schedule do not change.

        DeepSpeed has no call that drops gradients under every ZeRO stage, but all its optimizers skip a step with a
        non-finite gradient. So one more pass, over a single token, makes the gradient NaN.
        """
        idle = idle_micro_batch(self.world.device)
        idle.target.zero_()
        self._engine.backward(self._engine(idle, self._temperature).logp.sum() * torch.nan)
        return self.step(accumulated, clock)

    @contextmanager
    def optimizer_offloaded(self) -> Iterator[None]:
        """Context with master weights and moments in host memory, to make room for a sampler; ZeRO 1, 2 and 3."""
        from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum

        # Up to ZeRO-2 DeepSpeed holds views of the masters, so it must move them itself. It can move the rest only for its
        # own fused Adam, so the rest is moved by hand.
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
        """Move AdamW's moments to the device, and if asked the fp32 masters under ZeRO-3."""
        if masters:  # AdamW itself does not list them between steps
            for master in self._engine.optimizer.fp32_partitioned_groups_flat:
                master.data = master.data.to(device)
        for state in torch_optimizer(self._engine).state.values():
            for value in state.values():
                if isinstance(value, Tensor) and value.ndim:  # step counts stay where they are
                    value.data = value.data.to(device)

    def state_dict(self) -> dict:
        """Return what is the same on all ranks: shapes of the trained parameters by name, and the number of updates."""
        return {"shapes": shapes(self._trained), "updates": self._engine.lr_scheduler.last_epoch}

    def own_state(self) -> dict[str, dict]:
        """Copy this rank's part of masters and moments to host memory; any layout can load the parts of all ranks."""
        return save_pieces(own_pieces(self._engine, self._trained, self.world))

    def load(self, state: dict, saved: SavedPieces) -> None:
        """Load `state_dict` and every rank's `own_state`, from any ZeRO stage and number of ranks.

        The schedule continues at its position, with the learning rate configured now.

        Raises:
            UserError: they belong to another model.
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

    def _pack(self, batch: Sequences, rows: list[int]) -> MicroBatch:
        """Pack the rows; without rows, an idle micro-batch, so that this rank takes part in the collectives.

        Raises:
            ValueError: a response holds a token of probability 0; its log-prob is -inf, and the loss NaN.
        """
        if not rows:
            return idle_micro_batch(self.world.device)
        forbidden = torch.isin(batch.tokens[rows], torch.tensor(self.policy.forbidden_token_ids)) & batch.mask[rows]
        if forbidden.any():
            prompt = batch.prompts[rows[int(forbidden.any(1).nonzero()[0])]]
            raise ValueError(f"the response to row {prompt.row} holds an image or video pad, which has probability 0")
        return pack(batch, rows, self.policy.prompt_positions, self.policy.image_token_id, self.world.device)

    def _own_plan(self, batch: Sequences, at_least: int = 0) -> list[list[int]]:
        lengths = [len(prompt.token_ids) + length for prompt, length in zip(batch.prompts, batch.lengths.tolist())]
        return plan_micro_batches(lengths, self._token_budget, at_least=at_least)

    def _agreed_plan(self, batch: Sequences) -> list[list[int]]:
        """Plan the same number of micro-batches on every rank.

        The loop condition is the same on every rank, so none leaves before the next round's collective.
        """
        at_least, agreed = 0, 1
        while at_least != agreed:
            at_least = agreed
            plan = self._own_plan(batch, at_least)
            agreed = int(self.world.max(torch.tensor(len(plan))))
        return plan


def mean_metrics(parts: list[PolicyMetrics], world: World) -> dict[str, float]:
    """Return the fused loss's metrics as means over the tokens of all micro-batches and ranks."""
    names = [name for name in PolicyMetrics._fields if name.endswith("_sum")]
    sums = torch.stack(
        [torch.stack([getattr(part, name) for name in ("rows", *names)]).double() for part in parts]
    ).sum(0)
    rows, *totals = world.sum(sums).tolist()
    means = {name.removesuffix("_sum"): total / max(rows, 1) for name, total in zip(names, totals)}
    means["clip_fraction"] = means.pop("clipped")
    return means | {"ratio_max": float(world.max(torch.stack([part.ratio_max for part in parts]).max()))}
