"""LoRA: what is trained, that gradients are those of the merged weights, and that others get merged weights."""

import re

import pytest
import torch
from option_helpers import LORA, disturb, make_engine_with, options
from policy_helpers import model_dir, near_batch, plain_logp, plain_model, random_batch
from test_engine_ranks import CONFIG

from mssr.batch import UpdateBatch
from mssr.errors import UserError
from mssr.policy.export import adapter_weights
from mssr.policy.loading import load_policy
from mssr.policy.lora import without_adapters
from mssr.policy.loss import PolicyGradient
from mssr.policy.weights import named_weights, weight_shapes

SCALE = LORA.alpha / LORA.rank


def merged_by_hand(start: dict[str, torch.Tensor], parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return W + (alpha / rank) B A, in float64, rounded to W's dtype. parts: adapters by their names in the model."""
    whole = dict(start)
    for name, a in parts.items():
        if ".lora_A." in name:
            b = parts[name.replace("lora_A", "lora_B")]
            own = name.partition(".lora_A.")[0] + ".weight"
            whole[own] = (start[own].double() + SCALE * b.double() @ a.double()).to(start[own].dtype)
    return whole


def plain_weights(path) -> dict[str, torch.Tensor]:
    return dict(plain_model(path).named_parameters(remove_duplicate=False))


def test_only_the_language_models_targets_are_trained():
    policy = load_policy(model_dir(), torch.float32, options(lora=LORA))
    trained = {name for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
    layers = {name.partition(".lora_")[0] for name in trained}
    expected = {f"self_attn.{name}" for name in ("q_proj", "v_proj")} | {f"mlp.{n}" for n in ("up_proj", "down_proj")}
    assert layers == {f"model.language_model.layers.{layer}.{name}" for layer in (0, 1) for name in expected}
    assert len(trained) == 2 * len(layers)


def test_untrained_adapters_change_nothing_and_are_the_same_everywhere(world, prompts, plain):
    before = torch.get_rng_state()
    first, second = (make_engine_with(options(lora=LORA)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    batch = random_batch(prompts, [5, 9, 3, 7, 1, 12])
    torch.testing.assert_close(first.score(batch), plain_logp(plain, batch).float(), atol=1e-5, rtol=0)
    found, again = adapter_weights(first.policy), adapter_weights(second.policy)
    assert all(torch.equal(found[name], again[name]) for name in found) and any(map(torch.any, found.values()))


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gradients_are_those_of_the_merged_weights(world, prompts, gradient_checkpointing):
    """By the chain rule from plain transformers' gradient G of W + s B A: dA = s B^T G, dB = s G A^T."""
    engine = make_engine_with(options(lora=LORA, gradient_checkpointing=gradient_checkpointing), budget=1000)
    policy = engine.policy
    disturb(policy)
    parts = {name: part.clone() for name, part in adapter_weights(policy).items()}
    merged = plain_model(model_dir())
    merged.load_state_dict(merged_by_hand(plain_weights(model_dir()), parts))
    batch = random_batch(prompts, [5, 9, 3, 7, 1, 12])
    found, expected = {}, plain_logp(merged, batch)
    expected[batch.mask].sum().backward()
    dense = {name: parameter.grad for name, parameter in merged.named_parameters()}

    micro_batch = engine._pack(batch, list(range(len(batch))))
    out = policy(micro_batch, 1.0).logp
    torch.testing.assert_close(
        out.detach(), expected[micro_batch.row, micro_batch.column].float().detach(), atol=2e-5, rtol=0
    )
    out.sum().backward()
    for name, parameter in policy.model.named_parameters():
        if "lora_" not in name:
            assert parameter.grad is None, name
            continue
        found[name] = parameter.grad
        layer, which = name.split(".lora_")
        gradient, a, b = (
            dense[layer + ".weight"],
            parts[f"{layer}.lora_A.default.weight"],
            parts[f"{layer}.lora_B.default.weight"],
        )
        by_hand = SCALE * (b.T @ gradient if which.startswith("A") else gradient @ a.T)
        assert by_hand.abs().max() > 1e-3
        torch.testing.assert_close(parameter.grad, by_hand, atol=1e-4 * float(by_hand.abs().max()), rtol=0, msg=name)
    assert found.keys() == parts.keys()


def train(world, batches: list[UpdateBatch], **settings):
    """Train on this rank's half of each batch. Return the adapters, the merged weights that others get, and their shapes."""
    engine = make_engine_with(world=world, **settings)
    for batch in batches:
        share = len(batch) // world.size
        engine.update(batch.rows(world.rank * share, (world.rank + 1) * share), PolicyGradient(CONFIG))
    adapters = adapter_weights(engine.policy)
    seen = {name: weight.clone() for name, weight in named_weights(engine.policy, 60_000)}
    return adapters, seen, weight_shapes(engine.policy)


def batches_of(prompts, plain) -> list[UpdateBatch]:
    """Return two batches: rank 0's half has images, rank 1's half is text only."""
    text = prompts[2]
    return [near_batch([*prompts[:2], text, text], [9, 12, 7, 5], plain, seed=seed) for seed in (1, 2)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_weights_are_merged_under_their_own_names(ranks, world, prompts, plain, zero_stage, tied):
    path, batches = model_dir(tied), batches_of(prompts, plain)
    start = plain_weights(path)
    settings = {"model": options(path, lora=LORA), "lr": 1e-3}
    alone, _, _ = train(world, batches, **settings)
    assert all(part.abs().max() > 1e-4 for name, part in alone.items() if "lora_B" in name)
    for adapters, seen, shapes in ranks(train, batches, zero_stage=zero_stage, **settings):
        assert adapters.keys() == alone.keys()
        for name, part in adapters.items():
            assert (part - alone[name]).abs().mean() <= 1e-5, name
        expected = merged_by_hand(start, adapters)
        assert seen.keys() == shapes.keys() == expected.keys()
        assert [name for name in seen if name != "lm_head.weight"] == [
            name for name in start if name != "lm_head.weight"
        ]
        for name, weight in expected.items():
            adapted = re.search(r"layers.*(q_proj|v_proj|up_proj|down_proj)\.weight", name) and "visual" not in name
            assert shapes[name] == (weight.shape, weight.dtype) == (seen[name].shape, seen[name].dtype)
            assert torch.equal(start[name], seen[name]) == (not adapted), name
            torch.testing.assert_close(seen[name], weight, atol=1e-7, rtol=1e-6, msg=name)


def test_a_bfloat16_weight_is_merged_in_float32_and_rounded_once():
    policy = load_policy(model_dir(), torch.bfloat16, options(lora=LORA, dtype="bfloat16"))
    disturb(policy)
    start = {name: weight.bfloat16() for name, weight in plain_weights(model_dir()).items()}
    expected, rough = merged_by_hand(start, adapter_weights(policy)), 0
    for name, weight in named_weights(policy, 1):
        assert weight.dtype == torch.bfloat16
        wrong = (weight != expected[name]).float().mean()  # float64 sometimes rounds differently
        assert wrong <= 1e-3, name
        rough += int((weight != start[name]).any())
    assert rough == 8


@pytest.mark.parametrize("target", ["qkv", "lm_head", "embed_tokens", "q_pro", "mlp"])
def test_a_target_that_is_no_layer_of_the_language_model(target):
    lora = LORA.model_copy(update={"targets": ["q_proj", target]})
    with pytest.raises(
        UserError, match=rf"^model.lora.targets: {target} is no linear layer .* it has down_proj, gate_"
    ):
        load_policy(model_dir(), torch.float32, options(lora=lora))


def test_without_adapters_is_the_start_and_ends_with_the_block(world, prompts, plain):
    engine = make_engine_with(options(lora=LORA))
    disturb(engine.policy)
    batch = random_batch(prompts, [5, 9, 3, 7, 1, 12])
    adapted, start = engine.score(batch), plain_logp(plain, batch).float()
    assert (adapted - start).abs().max() > 0.1
    with pytest.raises(KeyboardInterrupt), without_adapters(engine.policy):
        torch.testing.assert_close(engine.score(batch), start, atol=1e-5, rtol=0)
        raise KeyboardInterrupt
    assert torch.equal(engine.score(batch), adapted)
    assert all(
        parameter.requires_grad == ("lora_" in name) for name, parameter in engine.policy.model.named_parameters()
    )
