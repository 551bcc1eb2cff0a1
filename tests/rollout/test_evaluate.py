"""Accuracy on held-out problems, on one rank and split over ranks."""

import math
from dataclasses import replace

import pytest
import torch
from policy_helpers import ALONE, DATA, digits, model_dir, processors
from rollout_engines import hf

from mssr.batch import GradedRollouts
from mssr.config.schema import EvalConfig
from mssr.data.dataset import ProblemDataset
from mssr.data.prompts import PromptEncoder
from mssr.evaluation.evaluate import evaluate
from mssr.policy.loading import load_policy
from mssr.rollout.base import noise_streams

LIMIT = 6


def held_out(count: int) -> ProblemDataset:
    return ProblemDataset(str(digits("val", count)), PromptEncoder(*processors(), DATA), DATA)


def odd_is_right(batch):
    """A judge for untrained weights: a response whose tokens sum to an odd number is right."""
    correct = (torch.where(batch.mask, batch.tokens, 0).sum(1) % 2).float()
    every, none = torch.ones(len(batch), dtype=torch.bool), torch.zeros(len(batch), dtype=torch.bool)
    parts, texts = tuple({"accuracy": each, "half": each / 2} for each in correct.tolist()), ("",) * len(batch)
    return GradedRollouts(
        **vars(batch), reward=correct, correct=correct, graded=every, masked=none, parts=parts, texts=texts
    )


def some_without_a_grade(judged):
    """What a judge that fails on responses that start with a token divisible by 3 makes of the same batch."""
    with_grade = judged.tokens[:, 0] % 3 != 0
    parts = tuple(parts if each else {} for parts, each in zip(judged.parts, with_grade))
    return replace(judged, graded=with_grade, correct=judged.correct * with_grade, parts=parts)


class Grader:
    """Of the trainer's grader what `evaluate` calls. judge: of the whole batch, at its end."""

    def __init__(self, judge):
        self.judge = judge

    def begin(self, prompts, advance):
        grading = Grading()
        grading.advance, grading.finish, grading.seen = advance, self._finish(grading, len(prompts)), []
        return grading

    def _finish(self, grading, count):
        def finish(batch):
            assert sorted(grading.seen) == list(range(count))  # graded beside the generation
            return self.judge(batch)

        return finish


class Grading:
    def __call__(self, row, response):
        self.seen.append(row)
        self.advance()


def sampler(policy):
    engine = hf(policy, LIMIT, ends=[processors()[0].eos_token_id])
    engine.update_weights(policy, 0)
    return engine


def run(world, path, count, **settings):
    policy = load_policy(path, torch.float32)
    rollout = sampler(policy)
    return evaluate(held_out(count), rollout, Grader(odd_is_right), world, EvalConfig(**settings), seed=4)


def answered(count, temperature=0.0):
    """Return the graded response to every problem, sampled without `evaluate`."""
    policy = load_policy(model_dir(), torch.float32)
    rollout = sampler(policy)
    return odd_is_right(rollout.generate(list(held_out(count)), list(range(count)), temperature))


def test_counts_every_problem_once():
    result, batch = run(ALONE, model_dir(), 13), answered(13)
    assert result.problems == 13
    assert result.accuracy == pytest.approx(float(batch.correct.mean()))
    assert 0 < result.accuracy < 1
    assert result.response_tokens == pytest.approx(float(batch.mask.sum()) / 13)
    assert result.truncated == pytest.approx(float(batch.truncated.float().mean()))


def test_several_samples_of_each_problem():
    """The mean over all. The first of each problem is what one sample would be; the others have their own noise."""
    found = run(ALONE, model_dir(), 5, temperature=1.0, samples=3)
    policy = load_policy(model_dir(), torch.float32)
    streams = [noise_streams(4, "eval", sample, range(5)) for sample in range(3)]
    batch = odd_is_right(sampler(policy).generate(list(held_out(5)) * 3, sum(streams, []), 1.0))
    assert (found.problems, found.samples) == (5, 3)
    assert found.accuracy == pytest.approx(float(batch.correct.mean()))
    assert found.response_tokens == pytest.approx(float(batch.mask.sum()) / 15)
    assert len({tuple(batch.response(row).tolist()) for row in (0, 5, 10)}) > 1
    one = run(ALONE, model_dir(), 5, temperature=1.0)
    assert one.accuracy == pytest.approx(float(batch.correct[:5].mean()))


def test_validation_has_its_own_top_p_and_top_k():
    """Of the most probable token alone: greedy responses."""
    greedy = run(ALONE, model_dir(), 5)
    for settings in ({"top_p": 1e-6}, {"top_k": 1}):
        assert run(ALONE, model_dir(), 5, temperature=1.0, **settings) == greedy
    assert run(ALONE, model_dir(), 5, temperature=1.0) != greedy


def test_responses_without_a_grade_are_neither_right_nor_wrong():
    policy = load_policy(model_dir(), torch.float32)
    judge = lambda batch: some_without_a_grade(odd_is_right(batch))  # noqa: E731
    result = evaluate(held_out(13), sampler(policy), Grader(judge), ALONE, EvalConfig(), seed=4)
    batch = some_without_a_grade(answered(13))
    assert 0 < int(batch.graded.sum()) < 13
    assert result.accuracy == pytest.approx(float(batch.correct[batch.graded].mean()))
    assert result.parts == {"accuracy": pytest.approx(result.accuracy), "half": pytest.approx(result.accuracy / 2)}
    none = lambda batch: replace(odd_is_right(batch), graded=torch.zeros(len(batch), dtype=torch.bool))  # noqa: E731
    assert math.isnan(evaluate(held_out(2), sampler(policy), Grader(none), ALONE, EvalConfig(), seed=4).accuracy)


def test_the_first_problems_only():
    result, batch = run(ALONE, model_dir(), 13, max_problems=5), answered(13)
    assert result.problems == 5
    assert result.accuracy == pytest.approx(float(batch.correct[:5].mean()))
    assert run(ALONE, model_dir(), 13, max_problems=50).problems == 13


def test_it_tells_how_far_it_is():
    told = []
    policy = load_policy(model_dir(), torch.float32)
    advance = lambda by, total: told.append((by, total))  # noqa: E731
    config = EvalConfig(max_problems=5, temperature=1.0, samples=2)
    evaluate(held_out(13), sampler(policy), Grader(odd_is_right), ALONE, config, seed=4, advance=advance)
    assert told == [(1, 10)] * 10


@pytest.mark.parametrize(
    ("count", "settings"), [(13, {}), (13, {"temperature": 1.0, "samples": 3}), (1, {}), (13, {"max_problems": 1})]
)
def test_two_ranks_find_what_one_does(ranks, count, settings):
    """Also for an odd number of problems, and for one problem, which leaves a rank without any."""
    alone = run(ALONE, model_dir(), count, **settings)
    assert ranks(run, model_dir(), count, **settings) == [alone, alone]
