"""A run's configuration: `schema` defines the keys, `load` reads a file, `resolve` decides what "auto" stands for."""

from mssr.config.load import load_config, validate_config  # noqa: F401
from mssr.config.schema import (  # noqa: F401
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
