"""The measured heads: hidden size and vocabulary by model name, and the shape of a case."""

from typing import NamedTuple


class Head(NamedTuple):
    d: int
    v: int
    softcap: float | None = None


# hidden_size, vocab_size and final_logit_softcapping of each model's published config.json.
MODELS = {
    "qwen2.5-vl-3b": Head(2048, 151936),
    "qwen2.5-vl-7b": Head(3584, 152064),
    "qwen3-vl-2b": Head(2048, 151936),
    "qwen3-vl-4b": Head(2560, 151936),
    "qwen3-vl-8b": Head(4096, 151936),
    "llama-3.1-8b": Head(4096, 128256),
    "gemma-2-9b": Head(3584, 256000, softcap=30.0),
}


class Shape(NamedTuple):
    """What a set of inputs is made from; `model` only names it."""

    model: str | None
    n: int  # tokens
    d: int
    v: int
    dtype: str
    rows: str  # a kind of `bench.inputs`
    softcap: float | None = None

    def __str__(self) -> str:
        head = self.model or f"D {self.d} V {self.v}"
        softcap = f" softcap {self.softcap:g}" if self.softcap else ""
        return f"{head} N {self.n} {self.dtype} {self.rows}{softcap}"


def of_model(model: str, n: int, dtype: str, rows: str) -> Shape:
    head = MODELS[model]
    return Shape(model, n, head.d, head.v, dtype, rows, head.softcap)
