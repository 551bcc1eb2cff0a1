"""`model.train_vision: false`: the vision tower gets no gradient and does not change; the rest trains as before."""

import pytest
import torch
from option_helpers import make_engine_with, options
from policy_helpers import assert_same_weights, model_dir, plain_logp, plain_model, random_batch, whole_weights

from mssr.policy.loading import load_policy
from mssr.policy.loss import PolicyGradient
from mssr_kernels import PolicyLossConfig

FROZEN = options(train_vision=False)


def in_tower(name: str) -> bool:
    return ".visual." in name


def train(world, batches, zero_stage, gradient_checkpointing=False):
    """Make two updates, each rank on its own rows. Return the unsharded weights."""
    model = options(train_vision=False, gradient_checkpointing=gradient_checkpointing)
    engine = make_engine_with(model, zero_stage=zero_stage, world=world, lr=1e-4)
    for _ in range(2):
        engine.update(batches[world.rank], PolicyGradient(PolicyLossConfig()))
    return whole_weights(engine)


@pytest.mark.parametrize("zero_stage, gradient_checkpointing", [(0, False), (2, True), (3, False), (3, True)])
def test_two_ranks_train_all_but_the_tower(ranks, world, prompts, zero_stage, gradient_checkpointing):
    """Rank 1 has no image."""
    text = prompts[2]
    whole = random_batch([*prompts[3:5], text, text], [9, 12, 7, 5])
    expected = train(world, [whole], 0)
    start = plain_model(model_dir()).state_dict()
    found = ranks(train, [whole.rows(0, 2), whole.rows(2, 4)], zero_stage, gradient_checkpointing)
    for weights in found:
        assert_same_weights(weights, expected)
        for name, weight in weights.items():
            assert torch.equal(weight, start[name]) == in_tower(name), name


def test_the_tower_gets_no_gradient_and_the_rest_the_same(prompts, plain):
    batch = random_batch(prompts, [5, 9, 3, 7, 1, 12])
    oracle = plain_model(model_dir())
    plain_logp(oracle, batch)[batch.mask].sum().backward()
    expected = {name: parameter.grad for name, parameter in oracle.named_parameters()}
    policy = load_policy(model_dir(), torch.float32, FROZEN)
    plain_logp(policy.model, batch)[batch.mask].sum().backward()
    for name, parameter in policy.model.named_parameters():
        assert (parameter.grad is None) == in_tower(name), name
        if not in_tower(name):
            tolerance = 1e-4 * float(expected[name].abs().max())
            torch.testing.assert_close(parameter.grad, expected[name], atol=tolerance, rtol=0, msg=name)
