"""MSSR: single-rollout reinforcement learning for vision-language models (arXiv 2512.18215).

    from mssr import load_config, train

    train(load_config("configs/tiny.yaml", ["train.steps=20"]))

Importing the package loads nothing; `load_config` and `train` load their libraries when they are first asked for.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["load_config", "train"]

_HOMES = {"load_config": "mssr.config", "train": "mssr.training.loop"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module("mssr.environment")  # first: torch and transformers read it on import
    return getattr(importlib.import_module(_HOMES[name]), name)
