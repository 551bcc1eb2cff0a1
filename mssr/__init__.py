"""MSSR: single-rollout reinforcement learning for vision-language models (arXiv 2512.18215)."""

__version__ = "0.1.0"
