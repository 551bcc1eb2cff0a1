"""Which responses are begun first."""

from mssr.rollout.lengths import ResponseLengths, longest_first


def test_the_longest_is_begun_first_and_ties_keep_their_order():
    assert longest_first([3.0, 9.0, 3.0, 10.0], 4) == [3, 1, 0, 2]
    assert longest_first(None, 3) == [0, 1, 2]


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
