"""Rollouts by real vLLM servers: they sample from the trainer's weights, and errors name the server.

The tests share one server, started by `mssr serve`; test_several_servers has two.
"""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from mssr_process import free_port
from policy_helpers import model_dir, plain_distribution, plain_model, processors
from rollout_engines import cut, say
from server_helpers import (
    Server,
    assert_same_responses,
    assert_samples_from,
    change_weights,
    greedy,
    greedy_oracle,
    rollout,
    serve_settings,
)

from mssr.config import validate_config
from mssr.errors import UserError
from mssr.policy.loading import load_policy
from mssr.rewards.builtin.judge import judge
from mssr.rewards.row import Row
from mssr.rollout.servers.serve import serve
from mssr.rollout.servers.weights import PolicySource


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("server")) as server:
        yield [server.wait()]


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


def test_a_judge_is_served_as_well(servers, many):
    """The reward `judge` asks vLLM's OpenAI interface, with a picture; every token of this reply has to be a 7."""
    tokenizer, _ = processors()
    request = {"max_tokens": 3, "logit_bias": {str(tokenizer.convert_tokens_to_ids("7")): 100}}
    picture = next(prompt.images[0] for prompt in many if prompt.images)
    options = {
        "url": f"{servers[0].url}/v1",
        "template": "{{ answer }} {{ final }}",
        "pattern": "7",
        "scale": 10,
        "retries": 0,
    }
    row = Row("?", "10", image_files=(picture,))

    async def ask(model):
        return await judge(r"\boxed{10}", row, model=model, images=True, request=request, **options)

    assert asyncio.run(ask(model_dir())) == 0.7
    with pytest.raises(UserError, match="HTTP 404: The model `wise` does not exist.*; .* is 'wise' one"):
        asyncio.run(ask("wise"))


def test_samples_are_reported_with_the_log_probs_they_were_drawn_with(servers, own_policy, many):
    engine = rollout(own_policy, servers)
    engine.update_weights(own_policy, 3)
    batch = engine.generate(many, list(range(len(many))), 0.7)
    assert_samples_from(batch, own_policy, temperature=0.7)
    pads = torch.tensor(own_policy.forbidden_token_ids)
    assert not torch.isin(batch.tokens[batch.mask], pads).any()
    assert len({tuple(batch.response(row).tolist()) for row in range(len(many))}) > 30
    engine.close()


def test_what_cuts_off_and_what_ends_a_response_reach_the_servers(servers, own_policy, prompts):
    """As in test_contract: log-probs of what top_p and top_k keep; the greedy response to a stop text."""
    engine = rollout(own_policy, servers)
    engine.update_weights(own_policy, 0)
    plain = plain_model(model_dir())
    batch = engine.generate(list(prompts), list(range(6)), 0.7, top_p=0.9, top_k=20)
    for row, prompt in enumerate(prompts):
        response = batch.response(row)
        with torch.no_grad():
            expected = cut(plain_distribution(plain, prompt, response, 0.7), 0.9, 20)
        expected = expected.gather(1, response[:, None]).squeeze(1)
        torch.testing.assert_close(batch.logp[row, : len(response)].double(), expected, atol=1e-4, rtol=0)
    engine.close()

    said = processors()[0].encode("xß–oxed{!abcd")
    say(own_policy, int(prompts[2].token_ids[-1]), said)
    engine = rollout(own_policy, servers, stop=["!", "–ox"])
    engine.update_weights(own_policy, 1)
    batch = greedy(engine, list(prompts[:3]))
    assert batch.tokens.tolist() == [said[:7]] * 3 and not batch.truncated.any()
    engine.close()


def test_each_response_is_told_once_as_it_comes_the_long_ones_first(servers, own_policy, many):
    """One request at a time: of two concurrent ones, the first to start may be the last to end."""
    engine = rollout(own_policy, servers, batch_size=1)
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


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_announced_is_what_comes(tied):
    """In the same order: receivers split the stream by the announcement. `weight_shapes` has tied weights elsewhere."""
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
        engine.generate([prompts[2]] * 20, list(range(20)), 1.0)  # it is unlikely that all 20 end by chance
    engine.close()


def test_a_server_says_when_it_is_ready(servers):
    lines = servers[0].log.splitlines()
    assert any(line.endswith(f"mssr: ready at {servers[0].url}; the trainer sends the weights") for line in lines)


def test_a_port_that_is_taken(servers, tmp_path):
    port = int(servers[0].url.rpartition(":")[2])
    with pytest.raises(UserError, match=rf"--port {port}: Address already in use"):
        serve(validate_config(serve_settings(tmp_path)), "127.0.0.1", port)


def test_a_server_that_never_comes(servers, own_policy, capfd):
    nobody = f"http://127.0.0.1:{free_port()}"
    engine = rollout(own_policy, [servers[0].url, nobody], server_timeout_s=1)
    with pytest.raises(UserError, match=rf"^rollout\.servers: not there after 1 s .*{nobody}: .*mssr serve"):
        engine.update_weights(own_policy, 0)
    assert f"for rollout.servers {nobody}: Cannot connect" in capfd.readouterr().out


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
