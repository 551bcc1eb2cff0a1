"""Expected response lengths, and the order in which an engine starts the requests of a call."""

import torch

from mssr.config.schema import RolloutConfig
from mssr.rollout.base import Response, RolloutEngine
from mssr.rollout.lengths import ResponseLengths


class Recorder(RolloutEngine):
    """An engine that answers each prompt with its own token, and records the order of the requests."""

    def update_weights(self, policy, version):
        self._weight_version = version

    def _sample(self, requests, temperature, finished):
        self.order = [request.row for request in requests]
        for request in requests:
            finished(request.row, Response(torch.tensor([request.stream]), torch.zeros(1), False, self._weight_version))


def started(expected_tokens, count):
    engine = Recorder(RolloutConfig(), ends=[], pad=0)
    engine.update_weights(None, 7)
    rollouts = engine.generate([object()] * count, list(range(count)), 1.0, expected_tokens=expected_tokens)
    assert rollouts.tokens.flatten().tolist() == list(range(count)) and set(rollouts.weight_version.tolist()) == {7}
    return engine.order


def test_the_longest_starts_first_and_ties_keep_their_order():
    assert started([3.0, 9.0, 3.0, 10.0], 4) == [3, 1, 0, 2]
    assert started(None, 3) == [0, 1, 2]


def test_a_prompts_last_response_is_what_is_expected_of_it():
    lengths = ResponseLengths()
    assert lengths.expected(["a", "b"]) == [0.0, 0.0]
    lengths.observe(["a", "b"], [10, 20])
    lengths.observe(["a"], [30])
    assert lengths.expected(["a", "b"]) == [30.0, 20.0]


def test_a_prompt_never_seen_is_taken_for_the_average_one():
    lengths = ResponseLengths()
    lengths.observe(["a", "b", "other"], [10, 20, 900])
    assert lengths.expected(["new", "a", "b"]) == [15.0, 10.0, 20.0]


def test_a_resumed_run_expects_the_same():
    lengths, resumed = ResponseLengths(), ResponseLengths()
    lengths.observe(["a"], [4])
    resumed.load_state_dict(lengths.state_dict())
    lengths.observe(["a"], [8])
    assert resumed.expected(["a"]) == [4.0]
