"""AdamW as DeepSpeed is given it, the learning rate of each update, and what keeps a bad gradient out."""

import math

import torch

from mssr.config import OptimizerConfig


class GuardedAdamW(torch.optim.AdamW):
    """Clips the global gradient norm, and leaves out an update whose gradient is not finite.

    For plain float32 training (ZeRO stage 0), where DeepSpeed's engine clips without telling the norm and checks nothing;
    ZeRO's optimizers do both on their own.

    overflow, _global_grad_norm: DeepSpeed's engine reads them after a step; after an overflow the schedule stays too.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], *, grad_clip: float, **settings) -> None:
        super().__init__(parameters, **settings)
        self.overflow = False
        self._global_grad_norm = 0.0
        self._clipped, self._grad_clip = parameters, grad_clip

    def step(self, closure=None) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self._clipped, self._grad_clip)
        self._global_grad_norm = float(norm)
        self.overflow = not math.isfinite(self._global_grad_norm)
        if not self.overflow:
            super().step(closure)


def make_optimizer(
    config: OptimizerConfig, parameters: list[torch.nn.Parameter], total_updates: int, *, guarded: bool
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """(AdamW, its schedule). guarded: with clipping and the check of its own.

    Fused, since the other variants need temporaries as large as all the parameters that they step.
    """
    settings = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay, "fused": True}
    if guarded:
        optimizer = GuardedAdamW(parameters, grad_clip=config.grad_clip, **settings)
    else:
        optimizer = torch.optim.AdamW(parameters, **settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: lr_factor(config, update, total_updates))
    return optimizer, schedule


def lr_factor(config: OptimizerConfig, update: int, total_updates: int) -> float:
    """What the learning rate is multiplied by on update 0, 1, ...: 1 from the first one unless a warm-up is asked for."""
    warm = min(1.0, (update + 1) / config.warmup_updates) if config.warmup_updates else 1.0
    if config.schedule == "constant":
        return warm
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, update / total_updates)))
