"""Training on samples of a cut distribution (rollout.top_p), and on responses that end at a text (rollout.stop)."""

import pytest
from run_folder import RunFolder

STANDS_STILL = ("train.optimizer.lr=1e-12", "algorithm.old_logp=recompute", "rollout.top_p=0.7", "eval.every=9")


@pytest.fixture(scope="module")
def cut(mssr, warm, tmp_path_factory):
    """Five steps, of which the last visits prompts again, with weights that hardly move."""
    run = RunFolder(tmp_path_factory.mktemp("cut") / "run")
    tracker = ("algorithm.tracker.drift=prompt", "algorithm.tracker.n_init=1")
    mssr("train", warm, run.override, *STANDS_STILL, *tracker, "rollout.stop=['}']", "train.steps=5").check()
    return run


def test_importance_weights_are_the_probability_that_is_kept(cut):
    """The sampler's log-probs are of what top_p keeps, the trainer's of the whole; the ratio starts at 1 all the same."""
    for line in cut.metrics[1:]:
        assert 0.7 - 1e-4 < line["policy/tis_weight"] < 0.999
        assert line["policy/ratio_max"] == pytest.approx(1, abs=1e-4)


def test_what_is_cut_off_is_neither_gap_nor_drift(cut):
    """First rollouts leave no log-probs of the whole distribution: drift is measured from the first visit on."""
    lines = cut.metrics[1:]
    assert all(line["rollout/logp_gap_max"] < 1e-4 for line in lines)
    drift = [line["tracker/drift_mean"] for line in lines]
    assert drift[:4] == [0] * 4 and 0 < drift[4] < 1e-4


def test_the_drift_of_a_batch_has_no_part_of_it_either(mssr, warm, tmp_path):
    run = RunFolder(tmp_path / "run")
    mssr("train", warm, run.override, *STANDS_STILL, "algorithm.tracker.drift=batch", "train.steps=1").check()
    assert run.metrics[1]["tracker/drift_mean"] < 1e-4


def test_responses_end_where_the_text_ends(cut):
    said = [rollout for step in range(1, 6) for rollout in cut.rollouts(step)]
    stopped = [rollout for rollout in said if "}" in rollout["response"]]
    assert len(stopped) > 40
    for rollout in stopped:
        assert rollout["response"].endswith("}") and not rollout["truncated"]
