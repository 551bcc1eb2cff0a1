"""Heads that can be measured: hidden size and vocabulary by model name, and the shape of a case."""

from typing import NamedTuple

# (hidden_size, vocab_size) of each model's published config.json.
MODELS = {
    "qwen2.5-vl-3b": (2048, 151936),
    "qwen2.5-vl-7b": (3584, 152064),
    "qwen3-vl-2b": (2048, 151936),
    "qwen3-vl-4b": (2560, 151936),
    "qwen3-vl-8b": (4096, 151936),
    "llama-3.1-8b": (4096, 128256),
}


class Shape(NamedTuple):
    """Shape of the inputs; `model` is only a name."""

    model: str | None
    n: int  # tokens
    d: int
    v: int
    dtype: str
    rows: str  # a kind of `bench.inputs`
