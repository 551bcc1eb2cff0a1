"""AdamW for DeepSpeed, with its learning rate schedule and a guard against non-finite gradients."""

import math

import torch

from mssr.config.schema import OptimizerConfig


class GuardedAdamW(torch.optim.AdamW):
    """Clips the global gradient norm, and skips an update whose gradient is not finite.

    For float32 without ZeRO (stage 0), where DeepSpeed neither reports the norm nor checks it; ZeRO's optimizers do both.

    overflow, _global_grad_norm: read by DeepSpeed after a step; after an overflow the schedule does not advance either.
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
    """Return (AdamW, its schedule). guarded: `GuardedAdamW`."""
    # The variants that are not fused need temporaries as large as all parameters.
    settings = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay, "fused": True}
    if guarded:
        optimizer = GuardedAdamW(parameters, grad_clip=config.grad_clip, **settings)
    else:
        optimizer = torch.optim.AdamW(parameters, **settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: lr_factor(config, update, total_updates))
    return optimizer, schedule


def lr_factor(config: OptimizerConfig, update: int, total_updates: int) -> float:
    """Return the factor of the learning rate for update 0, 1, ...; with warm-up, update 0 has 1 / warmup_updates."""
    warm = min(1.0, (update + 1) / config.warmup_updates) if config.warmup_updates else 1.0
    if config.schedule == "constant":
        return warm
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, update / total_updates)))
