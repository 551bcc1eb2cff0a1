"""The plan's bytes for a model whose tensors can be counted by hand; test_memory_plan.py measures real training."""

import pytest
from transformers import Qwen2Config

from mssr.config import validate_config
from mssr.planning.memory import Machine, Memory, MemoryPlanner
from mssr.planning.trace import MicroBatchShape

# Width 64, keys and values 32 wide, MLP 128 wide, 4 layers; a vocabulary of 1,000; embeddings and head are not tied.
LAYER = (64 * 64 + 64) + 2 * (64 * 32 + 32) + 64 * 64 + 3 * 64 * 128 + 2 * 64
ALL = 2 * 1000 * 64 + 4 * LAYER + 64
TOKENS, RESPONSES = 512, 300
SHAPE = MicroBatchShape((256, 256), RESPONSES)
# What autograd keeps of one layer in float32, per token: two RMS norms (input, normalized, output, one scale), queries, keys
# and values, the result of attention and its log-sum-exp for 4 heads, and four tensors of the MLP.
LAYER_KEEPS = 4 * (2 * (3 * 64 + 1) + 64 + 2 * 32 + 64 + 4 + 4 * 128)


def predict(model=None, train=None, *, layers=4, shape=SHAPE, ranks=1, micro_batches=2, kl_coef=0.0) -> Memory:
    config = validate_config({
        "run_dir": "unused", "data": {"train": "unused"}, "rollout": {"engine": "hf"},
        "model": {"path": "unused", "dtype": "float32", "attention": "flash"} | (model or {}),
        "algorithm": {"kl_coef": kl_coef, "old_logp": "recompute"},
        "train": {"micro_batch_tokens": TOKENS, "zero_stage": 2} | (train or {}),
    })  # fmt: skip
    architecture = Qwen2Config(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return MemoryPlanner(architecture, Machine(ranks)).predict(config, shape, micro_batches=micro_batches)


def kept(**options) -> int:
    return predict(**options).phases["forward_backward"]["activations"]


@pytest.mark.parametrize(
    ("stage", "ranks", "dtype", "weights", "masters", "moments", "gradients", "stepping"),
    [  # bytes per parameter of the whole model, on one rank
        (0, 1, "float32", 4, 0, 8, 0, 4),
        (1, 1, "float32", 4, 4, 8, 4, 4 + 4),  # in the optimizer step, also a flat copy of this rank's gradients
        (1, 2, "float32", 4, 2, 4, 4, 4 + 2),
        (2, 2, "float32", 4, 2, 4, 2, 2 + 2),
        (3, 2, "float32", 2, 2, 4, 2, 2),
        (2, 2, "bfloat16", 2, 2, 4, 1, 1 + 1 + 2),  # and a float32 copy of them
        (3, 2, "bfloat16", 1, 2, 4, 1, 1 + 2),
    ],
)
def test_bytes_per_parameter(stage, ranks, dtype, weights, masters, moments, gradients, stepping):
    memory = predict({"dtype": dtype}, {"zero_stage": stage}, ranks=ranks)
    assert memory.parameters.total == memory.parameters.trained == ALL
    expected = {"weights": weights * ALL, "fp32 masters": masters * ALL, "AdamW moments": moments * ALL}
    step = memory.phases["optimizer"]
    assert step == {part: size for part, size in expected.items() if size} | {"gradients": stepping * ALL}
    assert memory.phases["forward_backward"].get("gradients", 0) == gradients * ALL
    assert memory.host["copy for saving"] == (4 + 8) * ALL // ranks


def test_gradients_of_earlier_micro_batches_are_counted_once():
    """Without ZeRO the micro-batch's trace includes them, with ZeRO DeepSpeed's buffers do; the rest is equal."""
    plain, zero = (predict(train={"zero_stage": stage}).phases["forward_backward"] for stage in (0, 1))
    making = "one layer, its gradients"
    assert "gradients" not in plain and zero["gradients"] == 4 * ALL
    assert plain["activations"] == zero["activations"]
    assert plain[making] == zero[making] + zero["gradients"]
    assert "gradients" not in predict(train={"zero_stage": 1}, micro_batches=1).phases["forward_backward"]


def test_zero_takes_each_gradient_as_soon_as_it_is_made():
    """With few tokens, the peak beyond the kept activations is therefore less than the gradients of one layer."""
    shape = MicroBatchShape((4, 4), 2)
    parts = predict(train={"zero_stage": 3}, shape=shape, ranks=2).phases["forward_backward"]
    assert parts["one layer, its gradients"] < 4 * LAYER


def test_activations_of_a_layer():
    assert kept(layers=6) - kept(layers=4) == 2 * TOKENS * LAYER_KEEPS
    # With checkpointing a layer keeps only its input.
    checkpointed = {"gradient_checkpointing": True}
    assert kept(model=checkpointed, layers=6) - kept(model=checkpointed, layers=4) == 2 * TOKENS * 64 * 4


def test_activations_grow_with_the_tokens_and_only_sdpa_pads():
    twice = MicroBatchShape((256,) * 4, 2 * RESPONSES)
    head = 4 * (1000 * 64 + 1)  # its weight gradient and the loss, which do not depend on the number of tokens
    assert kept(shape=twice) - head == 2 * (kept() - head)
    uneven = MicroBatchShape((384, 128), RESPONSES)
    assert kept(shape=uneven) == kept()
    sdpa = {"attention": "sdpa"}
    assert kept(model=sdpa, shape=uneven) > kept(model=sdpa)


def test_with_lora_only_adapters_have_gradients_and_moments():
    rank = 4
    attention = 2 * rank * (64 + 64) + 2 * rank * (64 + 32)  # queries and outputs, keys and values
    adapters = 4 * (attention + 3 * rank * (64 + 128))
    memory = predict({"lora": {"rank": rank}})
    assert (memory.parameters.total, memory.parameters.trained) == (ALL + adapters, adapters)
    assert memory.phases["optimizer"] == {
        "weights": 4 * (ALL + adapters),
        "fp32 masters": 4 * adapters,
        "AdamW moments": 8 * adapters,
        "gradients": (4 + 4) * adapters,
    }
    assert memory.phases["forward_backward"]["gradients"] == 4 * adapters
    assert memory.host["copy for saving"] == (4 + 8) * adapters


@pytest.mark.parametrize(("where", "device", "gathered"), [("copy", 4, 0), ("cpu", 0, 0), ("sharded", 2, 4)])
def test_a_reference_is_where_the_configuration_puts_it(where, device, gathered):
    memory = predict({"reference": where}, ranks=2, kl_coef=0.1)
    assert all(parts.get("reference", 0) == device * ALL for parts in memory.phases.values())
    assert memory.phases["scoring"].get("reference in its pass", 0) == gathered * ALL
    assert memory.host.get("reference", 0) == (4 * ALL if where == "cpu" else 0)
    assert "reference" not in predict({"reference": where}, ranks=2).phases["scoring"]
