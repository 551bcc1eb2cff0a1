"""What the tracker learns in a run: successes, of responses with a grade only."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from mssr.algorithms.value_tracker import ValueTracker
from mssr.batch import GradedRollouts, Prompt, UpdateBatch
from mssr.config.algorithm_keys import AlgorithmConfig, TrackerConfig
from mssr.config.schema import RolloutConfig
from mssr.distributed import ALONE
from mssr.errors import UserError
from mssr.policy.engine import UpdateStats
from mssr.rollout.base import Response, collect
from mssr.training.shares import Shares
from mssr.training.tracking import initialise_tracker, refuse_missing_start, track

PROMPTS = [
    Prompt(f"key{row}", row, "", "", None, torch.zeros(1, dtype=torch.int64), None, None, ()) for row in range(4)
]
N0 = 8  # 1 / (1 - rho_min)


def graded(prompts, success, with_grade, reward=None):
    """Responses of one token, whose id is that of the prompt's row."""
    responses = [Response(torch.tensor([prompt.row]), torch.tensor([-1.0]), False, 0) for prompt in prompts]
    correct, without = torch.tensor(success), torch.zeros(len(prompts), dtype=torch.bool)
    return GradedRollouts(
        **vars(collect(prompts, responses, pad=0)),
        reward=correct if reward is None else torch.tensor(reward), correct=correct,
        graded=torch.tensor(with_grade, dtype=torch.bool), masked=without,
        parts=({},) * len(prompts), texts=("",) * len(prompts),
    )  # fmt: skip


@pytest.mark.parametrize("drift", ["prompt", "batch"])
def test_a_visit_without_a_grade_is_none(drift):
    """Two of four responses have a grade. Their rewards, 3 and -1, are not their successes, 1 and 0."""
    tracker, share = ValueTracker(TrackerConfig(drift=drift)), Shares(4, 4, ALONE)
    rollouts = graded(PROMPTS, [1.0, 0.0, 0.0, 0.0], [1, 0, 1, 0], reward=[3.0, 0.0, -1.0, 0.0])
    outcomes = share.outcomes(rollouts, tracker.values(rollouts.keys), 1)
    batch = UpdateBatch(
        rollouts.prompts, rollouts.tokens, rollouts.mask, rollouts.loss_mask,
        rollouts.logp, torch.zeros(4), rollouts.logp, None,
    )  # fmt: skip
    updates = [UpdateStats({}, rollouts.logp, grad_norm=1.0, lr=1.0)]
    rho_max = tracker.config.rho_max
    track(tracker, share, rollouts, batch, outcomes, torch.zeros(4), updates)
    after = [(N0 / 2 * rho_max + success) / (N0 * rho_max + 1) for success in (1, 0)]
    assert tracker.values(rollouts.keys).tolist() == pytest.approx([after[0], 0.5, after[1], 0.5])
    remembered = [tracker.previous(key) is not None for key in rollouts.keys]
    assert remembered == ([True, False, True, False] if drift == "prompt" else [False] * 4)


def test_first_rollouts_without_a_grade_are_left_out():
    """Two per prompt. Prompt 0: both right; 1: one right, one without a grade; 2: both wrong; 3: none with a grade."""
    success = {0: [1.0, 1.0], 1: [1.0, 0.0], 2: [0.0, 0.0], 3: [0.0, 0.0]}
    with_grade = {0: [1, 1], 1: [1, 0], 2: [1, 1], 3: [0, 0]}
    tracker = ValueTracker(TrackerConfig(n_init=2, drift="batch"))

    def finish(rollouts):
        visit = judged.append(None) or len(judged) - 1  # four prompts at once: a visit of each
        rows = [prompt.row for prompt in rollouts.prompts]
        return graded(rollouts.prompts, [success[row][visit] for row in rows], [with_grade[row][visit] for row in rows])

    @contextmanager
    def activity(what):
        yield lambda by, total: None

    class Problems:
        __len__ = staticmethod(lambda: 4)
        load = staticmethod(lambda rows: [PROMPTS[row] for row in rows])

    class Rollout:
        @staticmethod
        def generate(prompts, streams, temperature, **_):
            return SimpleNamespace(prompts=tuple(prompts))

    judged = []
    grader = SimpleNamespace(begin=lambda prompts, advance: SimpleNamespace(finish=finish))
    config = SimpleNamespace(responses_per_step=4, seed=0, rollout=RolloutConfig())
    run = SimpleNamespace(config=config, world=ALONE, problems=Problems(), activity=activity, grader=grader)
    assert initialise_tracker(tracker, run, Rollout()) == (8, 8)  # all of them have cost something
    # Jeffreys: (successes + 1/2) / (trials + 1); without trials 1/2
    expected = [2.5 / 3, 1.5 / 2, 0.5 / 3, 0.5]
    assert tracker.values([prompt.key for prompt in PROMPTS]).tolist() == pytest.approx(expected)


def test_a_run_whose_responses_all_failed_can_be_resumed():
    """Its tracker is as empty as that of a run without one."""
    algorithm = AlgorithmConfig(tracker=TrackerConfig(n_init=1))
    saved = {"tracker": {"keys": []}, "same_run": {"settings": {"algorithm.name": "mssr"}}}
    refuse_missing_start(algorithm, saved)
    saved["same_run"]["settings"]["algorithm.name"] = "grpo"
    with pytest.raises(UserError, match="the checkpoint's run had no value tracker"):
        refuse_missing_start(algorithm, saved)
