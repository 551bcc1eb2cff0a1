"""Each packed sequence gets the log-probs that it gets alone in plain transformers: own positions, attention, images."""

import math

import pytest
import torch
from policy_helpers import ALONE, plain_distribution, plain_inputs, plain_logp, plain_model, random_batch

from mssr.policy.packing import pack, plan_micro_batches

LENGTHS = [5, 9, 3, 7, 1, 12]


def scored(policy, batch, rows, temperature=1.0):
    """Return [B, R] log-probs of the rows, packed together in the given order."""
    micro_batch = pack(batch, rows, policy.prompt_positions, policy.image_token_id, ALONE.device)
    logp = torch.zeros(batch.tokens.shape)
    return logp.index_put((micro_batch.row, micro_batch.column), policy(micro_batch, temperature).logp)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 5], [5, 2, 4, 0], [2], [3]])
@torch.no_grad()
def test_packed_equals_alone(policy, plain, prompts, rows):
    batch = random_batch(prompts, LENGTHS)
    expected = torch.zeros(batch.tokens.shape)
    expected[rows] = plain_logp(plain, batch)[rows].float()
    torch.testing.assert_close(scored(policy, batch, rows), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_entropy_is_of_the_whole_distribution(policy, plain, prompts):
    batch = random_batch(prompts[:1], [4])
    micro_batch = pack(batch, [0], policy.prompt_positions, policy.image_token_id, ALONE.device)
    dist = plain_distribution(plain, prompts[0], batch.response(0))
    expected = torch.distributions.Categorical(logits=dist).entropy()
    torch.testing.assert_close(policy(micro_batch, 1.0).entropy.double(), expected, atol=1e-5, rtol=0)


def test_gradients_equal_those_of_each_sequence_alone(policy, model_dir, prompts):
    batch = random_batch(prompts, LENGTHS)
    weight = torch.randn(batch.tokens.shape, generator=torch.Generator().manual_seed(1)) * batch.mask
    model = plain_model(model_dir, attention="sdpa")
    (plain_logp(model, batch) * weight).sum().backward()
    (scored(policy, batch, range(6)) * weight).sum().backward()
    found = dict(policy.model.named_parameters())
    for name, parameter in model.named_parameters():
        assert (found[name].grad - parameter.grad).norm() < 1e-4 * parameter.grad.norm() + 1e-5, name
    policy.zero_grad(set_to_none=True)


@pytest.mark.parametrize("changed", [1, 2, 4])
@torch.no_grad()
def test_a_sequence_never_sees_its_neighbours(policy, prompts, changed):
    batch, other = random_batch(prompts, LENGTHS), random_batch(prompts, LENGTHS, seed=1)
    before = scored(policy, batch, range(6))
    batch.tokens[changed] = other.tokens[changed]
    after = scored(policy, batch, range(6))
    others = [row for row in range(6) if row != changed]
    torch.testing.assert_close(after[others], before[others], atol=1e-6, rtol=0)
    if LENGTHS[changed] > 1:
        assert (after[changed] - before[changed]).abs()[: LENGTHS[changed]].max() > 1e-2


@torch.no_grad()
def test_a_token_sees_only_its_past(policy, prompts):
    batch = random_batch(prompts, LENGTHS)
    before = scored(policy, batch, range(6))
    batch.tokens[5, 6] = batch.tokens[5, 6] % 100 + 101
    change = (scored(policy, batch, range(6)) - before).abs()
    assert change[5, :6].max() < 1e-6 and change[5, 6:12].min() > 1e-4


def test_prompt_positions_are_the_models_own(policy, plain, prompts):
    for prompt in prompts:
        inputs = plain_inputs(prompt, torch.tensor([20, 30, 40]), plain)
        types = inputs.get("mm_token_type_ids", torch.zeros_like(inputs["input_ids"]).int())
        whole = plain.model.get_rope_index(inputs["input_ids"], types, prompt.image_grid_thw)[0][:, 0]
        assert torch.equal(policy.prompt_positions(prompt), whole[:, :-3])

        batch = random_batch([prompt], [3])
        positions = pack(batch, [0], policy.prompt_positions, policy.image_token_id, ALONE.device).position_ids
        assert torch.equal(positions[1:, 0], whole)
        assert torch.equal(positions[0, 0], torch.arange(whole.shape[1]))


def test_pack_lays_out_the_rows_it_is_given(policy, prompts):
    batch = random_batch(prompts, LENGTHS)
    micro_batch = pack(batch, [3, 1], policy.prompt_positions, policy.image_token_id, ALONE.device)
    sequences = [torch.cat([prompts[row].token_ids, batch.response(row)]) for row in (3, 1)]
    assert torch.equal(micro_batch.input_ids[0], torch.cat(sequences))
    assert torch.equal(micro_batch.target, batch.tokens[micro_batch.row, micro_batch.column])
    assert torch.equal(micro_batch.input_ids[0, micro_batch.predicts + 1], micro_batch.target)
    assert micro_batch.row.tolist() == [3] * 7 + [1] * 9
    alone = [pack(batch, [row], policy.prompt_positions, policy.image_token_id, ALONE.device) for row in (3, 1)]
    assert torch.equal(micro_batch.position_ids, torch.cat([one.position_ids for one in alone], dim=2))
    assert torch.equal(micro_batch.image_grid_thw, torch.cat([prompts[3].image_grid_thw, prompts[1].image_grid_thw]))
    assert int(micro_batch.mm_token_type_ids.sum()) == 15 + 4


@pytest.mark.parametrize(
    ("lengths", "budget", "groups"),
    [
        ([5, 5, 5, 5], 10, 2),
        ([5, 5, 5, 5], 20, 1),
        ([6, 6, 6], 10, 3),  # their sum fits into two groups, but no two rows fit into one
        ([100], 10, 1),
        ([100, 1, 1], 10, 2),
        ([3, 100, 4, 50, 3], 10, 3),
        ([7, 1, 9, 2, 4, 4, 3, 8], 12, 4),
    ],
)
def test_plan_keeps_the_budget_in_the_fewest_groups(lengths, budget, groups):
    plan = plan_micro_batches(lengths, budget)
    assert sorted(row for group in plan for row in group) == list(range(len(lengths)))
    assert all(group == sorted(group) for group in plan)
    for group in plan:
        assert len(group) == 1 or sum(lengths[row] for row in group) <= budget
    assert len(plan) == groups


def test_plan_fills_evenly():
    loads = [sum(group) for group in plan_micro_batches([1] * 30, 20)]
    assert len(loads) == 2
    assert [len(group) for group in plan_micro_batches([1] * 30, 20)] == [15, 15]


@pytest.mark.parametrize("at_least", [1, 2, 3, 5, 8])
def test_plan_makes_as_many_groups_as_asked(at_least):
    plan = plan_micro_batches([4, 3, 5], 6, at_least=at_least)
    assert len(plan) == max(at_least, 3)
    assert sorted(row for group in plan for row in group) == [0, 1, 2]
    assert sum(not group for group in plan) == max(0, at_least - 3)


def test_plan_of_random_rows():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        count, budget = torch.randint(1, 40, (2,), generator=generator).tolist()
        lengths = torch.randint(1, 30, (count,), generator=generator).tolist()
        plan = plan_micro_batches(lengths, budget)
        assert sorted(row for group in plan for row in group) == list(range(count))
        assert all(plan)
        assert all(len(group) == 1 or sum(lengths[row] for row in group) <= budget for group in plan)
        assert len(plan) >= math.ceil(sum(min(length, budget) for length in lengths) / budget)
