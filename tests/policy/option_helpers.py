"""Engines with options of section `model` beyond dtype and gradient checkpointing, for the tests of these options."""

import torch
from policy_helpers import ALONE, model_dir

from mssr.config.schema import LoraConfig, ModelConfig, OptimizerConfig, TrainConfig
from mssr.policy.engine import PolicyEngine

LORA = LoraConfig(rank=4, alpha=6.0, targets=["q_proj", "v_proj", "up_proj", "down_proj"])


def options(path: str | None = None, **model) -> ModelConfig:
    return ModelConfig(path=path or model_dir(), **{"dtype": "float32"} | model)


def make_engine_with(
    model: ModelConfig, *, zero_stage: int = 0, budget: int = 64, world=ALONE, lr: float = 1e-2
) -> PolicyEngine:
    return PolicyEngine(
        model,
        OptimizerConfig(lr=lr, grad_clip=1.0),
        TrainConfig(micro_batch_tokens=budget, zero_stage=zero_stage),
        world,
        temperature=1.0,
        total_updates=10,
    )


@torch.no_grad()
def disturb(policy, std: float = 0.05) -> None:
    """Set the adapters as if they were trained: B is no longer 0."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
