"""Rollouts by two real vLLM servers: shared by ranks, and lost one after the other. Tests that kill a server come last."""

import pytest
import torch
from policy_helpers import make_engine
from policy_helpers import prompts as make_prompts
from server_helpers import Server, assert_same_responses, change_weights, greedy, greedy_oracle, rollout

from mssr.errors import UserError

pytestmark = [
    pytest.mark.slow("60 s: two real servers; test_servers has one, test_server_failover fakes"),
    pytest.mark.random_order(disabled=True),  # the last two kill the servers
]


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    started = [Server(tmp_path_factory.mktemp("servers")) for _ in range(2)]
    try:
        yield [server.wait() for server in started]
    finally:
        for server in started:
            server.go_on()
            server.kill()


def ranks_roll_out(world, servers, zero_stage):
    """Return greedy rollouts of this rank's half of the prompts, before and after a change of the weights."""
    trainer = make_engine(world=world, zero_stage=zero_stage)
    engine = rollout(trainer.policy, servers, world=world)
    engine.update_weights(trainer.policy, 0)
    mine = list(make_prompts())[world.rank :: 2]
    batches = [greedy(engine, mine)]
    with torch.no_grad():
        scale_all(trainer.policy)
    engine.update_weights(trainer.policy, 1)
    batches.append(greedy(engine, mine))
    engine.close()
    return batches


def scale_all(policy) -> None:
    """Multiply every weight by 1.1, whether it is sharded or not."""
    for parameter in policy.parameters():
        (parameter.ds_tensor if parameter.numel() == 0 else parameter).mul_(1.1)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_ranks_share_the_servers(ranks, servers, own_policy, prompts, zero_stage):
    urls = [server.url for server in servers]
    results = ranks(ranks_roll_out, urls, zero_stage, timeout=180)
    for number in range(2):
        for rank, batches in enumerate(results):
            assert_same_responses(batches[number], greedy_oracle(own_policy, list(prompts)[rank::2]))
            assert batches[number].weight_version.tolist() == [number] * 3
        for parameter in own_policy.parameters():
            parameter.mul_(1.1)


def test_a_server_that_falls_silent_is_left_out_and_comes_back(servers, own_policy, many, capfd):
    engine = rollout(own_policy, servers, server_timeout_s=10)
    engine.update_weights(own_policy, 0)
    capfd.readouterr()
    told = []
    stop = once(servers[1].stop)

    def on_response(row, response):
        told.append(row)
        stop()

    try:
        batch = greedy(engine, many, on_response=on_response)
    finally:
        servers[1].go_on()
    assert sorted(told) == list(range(len(many)))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"mssr: rollout server {servers[1].url} is out: nothing came from it for 10 s")
    assert_same_responses(batch, greedy_oracle(own_policy, many))

    change_weights(own_policy, seed=1)
    engine.update_weights(own_policy, 1)
    assert '"1"' in servers[1].ask("/weight_info")
    assert_same_responses(greedy(engine, many), greedy_oracle(own_policy, many))
    assert capfd.readouterr().err == ""
    engine.close()


def test_a_server_that_dies_loses_nothing(servers, own_policy, many, capfd):
    engine = rollout(own_policy, servers)
    engine.update_weights(own_policy, 0)
    capfd.readouterr()
    told = []
    kill = once(servers[0].kill)

    def on_response(row, response):
        told.append(row)
        kill()

    batch = greedy(engine, many, on_response=on_response)
    assert_same_responses(batch, greedy_oracle(own_policy, many))
    assert sorted(told) == list(range(len(many)))

    change_weights(own_policy, seed=1)
    engine.update_weights(own_policy, 1)
    batch = greedy(engine, many)
    assert_same_responses(batch, greedy_oracle(own_policy, many))
    assert batch.weight_version.tolist() == [1] * len(many)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"mssr: rollout server {servers[0].url} is out: ")
    engine.close()


def test_no_server_left(servers, own_policy, many):
    servers[0].kill()
    engine = rollout(own_policy, servers[1:])
    engine.update_weights(own_policy, 0)
    kill = once(servers[1].kill)
    with pytest.raises(UserError, match=rf"^rollout\.servers: not there: {servers[1].url}: "):
        greedy(engine, many, on_response=lambda row, response: kill())
    with pytest.raises(UserError, match=rf"^rollout\.servers: not there: {servers[1].url}: "):
        engine.update_weights(own_policy, 1)
    engine.close()


def once(action):
    """Return a function that runs the action only at its first call."""
    todo = [action]
    return lambda: todo.pop()() if todo else None
