"""A run's configuration: `schema` defines the keys, `load` reads a file, `resolve` decides what "auto" stands for."""

from mssr.config.load import load_config, validate_config
from mssr.config.schema import (
    AlgorithmConfig,
    BudgetConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RolloutConfig,
    SftConfig,
    TrackerConfig,
    TrainConfig,
)

__all__ = [
    "AlgorithmConfig", "BudgetConfig", "Config", "DataConfig", "EvalConfig", "LogConfig", "LoraConfig", "ModelConfig",
    "OptimizerConfig", "RewardConfig", "RolloutConfig", "SftConfig", "TrackerConfig", "TrainConfig", "load_config",
    "validate_config",
]  # fmt: skip
