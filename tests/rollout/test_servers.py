"""Rollouts by real vLLM servers: they sample from the trainer's weights, and none of them is needed.

The tests share two servers, started by `mssr serve`. What loses one for good comes last.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from mssr_process import free_port
from policy_helpers import ALONE, make_engine, model_dir, plain_logp, plain_model, processors
from policy_helpers import prompts as make_prompts
from server_helpers import ENDS, RESPONSE_TOKENS, Server, rollout, serve_settings

from mssr.config import RolloutConfig, validate_config
from mssr.errors import UserError
from mssr.policy.loading import load_policy
from mssr.rollout.hf import HFRollout
from mssr.rollout.server_weights import PolicySource
from mssr.serve import serve


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    started = [Server(tmp_path_factory.mktemp("servers")) for _ in range(2)]
    try:
        yield [server.wait() for server in started]
    finally:
        for server in started:
            server.go_on()
            server.kill()


@pytest.fixture
def own_policy():
    """A policy whose weights a test may change."""
    return load_policy(model_dir(), torch.float32).requires_grad_(False)


@pytest.fixture(scope="module")
def many(prompts):
    """Text alone, one image and two, in one batch; far more than the servers take at once."""
    return list(prompts) * 6


def change_weights(policy, seed: int) -> None:
    """Every weight by up to a fifth: the language model's and the vision tower's, matrices, norms and biases."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
        parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))


def greedy_oracle(policy, prompts):
    """What transformers' own generation gives."""
    tokenizer, _ = processors()
    ends = sorted({tokenizer.eos_token_id, *ENDS})
    config = RolloutConfig(max_response_tokens=RESPONSE_TOKENS)
    engine = HFRollout(policy, ends, tokenizer.pad_token_id, config, ALONE.device)
    engine.update_weights(policy, 0)
    return engine.generate(prompts, [0] * len(prompts), 0.0)


def greedy(engine, prompts, **settings):
    return engine.generate(prompts, [0] * len(prompts), 0.0, **settings)


def assert_same_responses(found, expected):
    assert len(found) == len(expected)
    assert [found.response(row).tolist() for row in range(len(found))] == [
        expected.response(row).tolist() for row in range(len(expected))
    ]
    assert torch.equal(found.truncated, expected.truncated)
    torch.testing.assert_close(found.logp, expected.logp, atol=1e-4, rtol=0)


def assert_samples_from(batch, policy, temperature=1.0):
    """The log-probs are those of plain transformers with the policy's weights."""
    plain = plain_model(model_dir())
    plain.load_state_dict(policy.model.state_dict())
    with torch.no_grad():
        expected = plain_logp(plain, batch, temperature)
    torch.testing.assert_close(batch.logp.double(), expected, atol=1e-4, rtol=0)


def test_every_sync_brings_all_weights_and_leaves_nothing_of_the_old_ones(servers, own_policy, many):
    engine = rollout(own_policy, servers)
    before = None
    for version in (0, 1, 2):
        if version:
            change_weights(own_policy, seed=version)
        engine.update_weights(own_policy, version)
        batch = greedy(engine, many)
        assert batch.prompts == tuple(many)
        assert batch.weight_version.tolist() == [version] * len(many)
        assert_same_responses(batch, greedy_oracle(own_policy, many))
        assert_samples_from(batch, own_policy)
        assert before is None or not torch.equal(before.tokens, batch.tokens)
        before = batch
        for server in servers:
            assert f'"{version}"' in server.ask("/weight_info")
    assert 0 < int(before.truncated.sum()) < len(many)
    engine.close()


def test_samples_are_reported_with_the_log_probs_they_were_drawn_with(servers, own_policy, many):
    engine = rollout(own_policy, servers)
    engine.update_weights(own_policy, 3)
    batch = engine.generate(many, list(range(len(many))), 0.7)
    assert_samples_from(batch, own_policy, temperature=0.7)
    pads = torch.tensor(own_policy.forbidden_token_ids)
    assert not torch.isin(batch.tokens[batch.mask], pads).any()
    assert len({tuple(batch.response(row).tolist()) for row in range(len(many))}) > 30
    engine.close()


def test_each_response_is_told_once_as_it_comes_the_long_ones_first(servers, own_policy, many):
    """On one server, one at a time: beside another server's, a response begun first may well end later."""
    engine = rollout(own_policy, servers[:1], batch_size=1)
    engine.update_weights(own_policy, 0)
    told = []
    expected = [float(row == 17) for row in range(len(many))]
    batch = greedy(engine, many, expected_tokens=expected, on_response=lambda row, one: told.append((row, one)))
    assert sorted(row for row, _ in told) == list(range(len(many)))
    assert told[0][0] == 17
    for row, response in told:
        assert response.tokens.tolist() == batch.response(row).tolist()
    engine.close()


def test_generates_in_another_thread(servers, own_policy, many):
    engine = rollout(own_policy, servers)
    engine.update_weights(own_policy, 0)
    with ThreadPoolExecutor(max_workers=1) as thread:
        batch = thread.submit(greedy, engine, many).result()
    assert_same_responses(batch, greedy(engine, many))
    engine.close()


def ranks_roll_out(world, servers, zero_stage):
    """Each rank asks for its own half of the prompts, before and after a change of the weights."""
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
    """Every weight, in whatever shares it is held."""
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


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_announced_is_what_comes(tied):
    """Name for name: a receiver cuts the stream by what was announced. `weight_shapes` has tied weights elsewhere."""
    policy = load_policy(model_dir(tied), torch.float32)
    source = PolicySource(policy, 1 << 20)
    announced = [(one.name, one.dtype, one.shape) for one in source.metadata()]
    assert announced == [(name, weight.dtype, tuple(weight.shape)) for name, weight in source]
    assert {name for name, *_ in announced} == dict(policy.model.named_parameters(remove_duplicate=False)).keys()


def test_a_request_the_servers_refuse_is_an_error(servers, own_policy, prompts):
    engine = rollout(own_policy, servers)
    engine.update_weights(own_policy, 0)
    long = replace(prompts[2], token_ids=prompts[2].token_ids.repeat(100))
    with pytest.raises(
        UserError, match=r"^rollout\.servers http://.*/inference/v1/generate was refused with 400: .*256"
    ):
        greedy(engine, [*prompts, long])
    engine.close()


def test_servers_that_were_started_for_shorter_responses(servers, own_policy, prompts):
    engine = rollout(own_policy, servers, max_response_tokens=4096, ends=[])
    engine.update_weights(own_policy, 0)
    with pytest.raises(UserError, match=r"cuts responses at \d+ tokens, before rollout.max_response_tokens 4096"):
        engine.generate([prompts[2]] * 20, list(range(20)), 1.0)  # that each of them ends by chance is unlikely
    engine.close()


def test_a_port_that_is_taken(servers, tmp_path):
    port = int(servers[0].url.rpartition(":")[2])
    with pytest.raises(UserError, match=rf"--port {port}: Address already in use"):
        serve(validate_config(serve_settings(tmp_path)), "127.0.0.1", port)


@pytest.mark.parametrize("address", ["127.0.0.1:8000", "https://host:8000", "http://host", "http://host:port"])
def test_an_address_that_is_none(own_policy, address):
    with pytest.raises(UserError, match=f"^rollout.servers {address}: expected http://host:port$"):
        rollout(own_policy, [address])


def test_a_server_that_never_comes(servers, own_policy):
    nobody = f"http://127.0.0.1:{free_port()}"
    engine = rollout(own_policy, [servers[0].url, nobody], server_timeout_s=1)
    with pytest.raises(UserError, match=rf"^rollout\.servers: not there after 1 s .*{nobody}: .*mssr serve"):
        engine.update_weights(own_policy, 0)


def test_a_server_of_something_else(own_policy):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        with pytest.raises(UserError, match=f"^rollout.servers {url}"):
            rollout(own_policy, [url]).update_weights(own_policy, 0)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


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
    """The action, the first time it is called."""
    todo = [action]
    return lambda: todo.pop()() if todo else None
