"""The policy's unsharded weights by name: the same on every rank and under every ZeRO stage, one bucket at a time."""

import pytest
import torch
from policy_helpers import make_engine, model_dir, plain_model

from mssr.policy.loading import load_policy
from mssr.policy.weights import named_weights, weight_shapes

BUCKET = 100_000  # bytes; fits several matrices of a layer, but not the largest parameter


def held(policy) -> list[int]:
    """Return the size in bytes of each sharded parameter that is gathered on this rank at the moment."""
    shared = [parameter for parameter in policy.parameters() if not getattr(parameter, "ds_persist", True)]
    return [parameter.nbytes for parameter in shared if parameter.numel()]


def gather(world, bucket, **settings):
    """Return what `named_weights` yields, the bytes gathered at each weight, and the shapes."""
    policy = make_engine(world=world, **settings).policy
    at_rest, found, most = held(policy), {}, []
    for name, weight in named_weights(policy, bucket):
        assert name not in found
        found[name] = weight.clone()
        most.append((sum(held(policy)), len(held(policy))))
    assert held(policy) == at_rest
    shapes = {name: (shape, dtype) for name, (shape, dtype) in weight_shapes(policy).items()}
    return list(found), found, most, shapes


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_every_weight_whole_under_its_name(ranks, zero_stage, tied):
    path = model_dir(tied)
    plain = plain_model(path)
    expected = dict(plain.named_parameters(remove_duplicate=False))
    assert ("lm_head.weight" in expected) and expected.keys() == plain.state_dict().keys()
    for names, found, _, shapes in ranks(gather, BUCKET, path=path, zero_stage=zero_stage):
        assert found.keys() == shapes.keys() == expected.keys()
        for name, weight in expected.items():
            assert torch.equal(found[name], weight), name
            assert shapes[name] == (weight.shape, weight.dtype), name
        order = [name for name in names if name != "lm_head.weight"]
        assert order == [name for name in expected if name != "lm_head.weight"]


@pytest.mark.parametrize("bucket", [1, BUCKET, 1 << 30])
def test_no_more_than_a_bucket_is_whole_at_a_time(ranks, bucket):
    sizes = [parameter.nbytes for parameter in plain_model(model_dir()).parameters()]
    assert max(sizes) > 2 * BUCKET
    for _, _, most, _ in ranks(gather, bucket, path=model_dir(), zero_stage=3):
        assert all(size <= bucket or count == 1 for size, count in most)
        assert max(size for size, _ in most) >= min(bucket, max(sizes))
        assert max(count for _, count in most) > {1: 0, BUCKET: 2, 1 << 30: 20}[bucket]  # buckets are filled


def leave_early(world, **settings):
    policy = make_engine(world=world, **settings).policy
    for name, _ in named_weights(policy, BUCKET):
        if "language_model.layers.0" in name:
            whole = sum(held(policy))
            break
    after_break = held(policy)
    try:
        for name, _ in (weights := named_weights(policy, BUCKET)):
            if "lm_head" in name:
                raise OSError("the consumer's")
    except OSError:
        weights.close()
    after_error = held(policy)
    again = {name: weight.clone() for name, weight in named_weights(policy, BUCKET)}
    return whole, after_break, after_error, again


def test_a_consumer_that_stops_leaves_nothing_gathered(ranks):
    expected = plain_model(model_dir()).state_dict()
    for whole, after_break, after_error, again in ranks(leave_early, path=model_dir(), zero_stage=3):
        assert whole > 0 and after_break == after_error == []
        assert all(torch.equal(again[name], weight) for name, weight in expected.items())


def test_unpartitioned_weights_are_the_parameters_themselves():
    policy = load_policy(model_dir(True), torch.float32)
    weights = dict(named_weights(policy, BUCKET))
    assert weights["lm_head.weight"].data_ptr() == weights["model.language_model.embed_tokens.weight"].data_ptr()
    for name, parameter in policy.model.named_parameters(remove_duplicate=False):
        assert weights[name].data_ptr() == parameter.data_ptr() and not weights[name].requires_grad
