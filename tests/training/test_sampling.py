"""A step's batch: from the right weights, or the run stops. Prompts and responses are prepared during the step before."""

import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from examples.digits.problems import write_digits
from mssr.algorithms.value_tracker import ValueTracker
from mssr.config import load_config
from mssr.data.dataset import ProblemDataset
from mssr.data.files import open_rows
from mssr.data.prompts import PromptEncoder
from mssr.data.sampler import PromptSampler
from mssr.distributed import ALONE
from mssr.errors import BadRow, UserError
from mssr.rollout.base import Response, collect, noise_streams
from mssr.stopwatch import Stopwatch
from mssr.training.rollout_phase import RolloutPhase, refuse_other_weights
from mssr.training.run import Run
from mssr.training.shares import Shares
from mssr.training.tracking import initialise_tracker


def test_responses_of_the_right_weights_pass():
    refuse_other_weights(SimpleNamespace(weight_version=torch.tensor([4, 4])), step=4, version=4)
    refuse_other_weights(SimpleNamespace(weight_version=torch.tensor([3, 3])), step=4, version=3)


@pytest.mark.parametrize("versions", [[4, 3], [5, 4], [0, 0]])
def test_one_of_others_stops_the_run(versions):
    with pytest.raises(UserError, match=r"^step 5: . responses were sampled from the weights of step \d, not 4"):
        refuse_other_weights(SimpleNamespace(weight_version=torch.tensor(versions)), step=4, version=4)


def test_a_sync_that_does_nothing_stops_the_step(material, single_process):
    with Run(load_config(material / "config.yaml")) as run:
        engine = run.policy_engine(run.config.train.optimizer, temperature=1.0, total_updates=1)
        rollouts = RolloutPhase(run, engine, Shares(16, 8, run.world), ValueTracker(run.config.algorithm.tracker))
        clock = Stopwatch(run.world.device)
        assert rollouts.take(0, clock).rollouts.weight_version.tolist() == [0] * 16
        rollouts._rollout.update_weights = lambda policy, version: None
        with pytest.raises(UserError, match="step 2: 16 responses were sampled from the weights of step 0, not 1"):
            rollouts.take(1, clock)


class Recorded:
    """Records the noise streams of each call of a rollout engine."""

    def __init__(self, monkeypatch, engine) -> None:
        self.streams: list[list[int]] = []
        generate = engine.generate

        def recorded(prompts, streams, *args, **kwargs):
            self.streams.append(list(streams))
            return generate(prompts, streams, *args, **kwargs)

        monkeypatch.setattr(engine, "generate", recorded)


def test_no_two_responses_of_two_steps_share_their_noise(material, single_process, monkeypatch):
    with Run(load_config(material / "config.yaml")) as run:
        engine = run.policy_engine(run.config.train.optimizer, temperature=1.0, total_updates=1)
        rollouts = RolloutPhase(run, engine, Shares(16, 8, run.world), ValueTracker(run.config.algorithm.tracker))
        recorded, clock = Recorded(monkeypatch, rollouts._rollout), Stopwatch(run.world.device)
        for step in (0, 1):
            rollouts.take(step, clock)
    assert len({stream for streams in recorded.streams for stream in streams}) == 32


def test_first_rollouts_are_drawn_apart_and_judged_like_others(material, single_process, monkeypatch):
    """Two per prompt, all truncated and so failed, whatever their reward: the value is (0 + 1/2) / (2 + 1)."""
    settings = ["algorithm.tracker.n_init=2", "rollout.truncated=failed", "rollout.max_response_tokens=1"]
    with Run(load_config(material / "config.yaml", settings)) as run:
        engine = run.policy_engine(run.config.train.optimizer, temperature=1.0, total_updates=1)
        tracker, rollout = ValueTracker(run.config.algorithm.tracker), run.rollout_engine(engine.policy)
        rollout.update_weights(engine.policy, 0)
        recorded, begin = Recorded(monkeypatch, rollout), run.grader.begin

        def all_right(prompts, advance):
            grading = begin(prompts, advance)
            finish = grading.finish
            grading.finish = lambda rollouts: replace(finish(rollouts), correct=torch.ones(len(rollouts)))
            return grading

        @contextmanager
        def activity(what):
            yield lambda by, total: told.append((what, by, total))

        told = []
        monkeypatch.setattr(run.grader, "begin", all_right)
        monkeypatch.setattr(run, "activity", activity)
        assert initialise_tracker(tracker, run, rollout) == (128, 128)
        keys = [prompt.key for prompt in run.problems.load(range(64))]
    assert len({stream for streams in recorded.streams for stream in streams}) == 128
    assert tracker.values(keys).tolist() == pytest.approx([1 / 6] * 64)
    assert told[-129][0] != told[-128][0] and set(told[-128:]) == {("first rollouts of the value tracker", 1, 128)}


def test_the_responses_of_a_group_answer_one_prompt(material, single_process):
    groups = ["algorithm.name=grpo", "rollout.prompts_per_step=4", "rollout.responses_per_prompt=4"]
    with Run(load_config(material / "config.yaml", groups)) as run:
        engine = run.policy_engine(run.config.train.optimizer, temperature=1.0, total_updates=1)
        rollouts = RolloutPhase(run, engine, Shares(16, 8, run.world), ValueTracker(run.config.algorithm.tracker))
        taken = rollouts.take(0, Stopwatch(run.world.device)).rollouts
    rows = PromptSampler(64, 4, run.config.seed).rows(0)
    assert [prompt.row for prompt in taken.prompts] == [row for row in rows for _ in range(4)]


class Beside:
    """A rollout engine with one-token responses that logs its calls.

    A call in another thread ends when the test releases `may_end`.
    """

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []  # "sync", "generate" or "end" (of generating), and the weights' version
        self.asked: list[tuple[list[int], list[int]]] = []  # rows and noise streams of each call
        self.may_end = threading.Semaphore(0)
        self._main = threading.get_ident()

    def update_weights(self, policy, version):
        self.log.append(("sync", version))
        self._version = version

    def generate(self, prompts, streams, temperature, *, top_p, top_k, expected_tokens, on_response):
        version = self._version
        self.log.append(("generate", version))
        self.asked.append(([prompt.row for prompt in prompts], streams))
        if threading.get_ident() != self._main:
            assert self.may_end.acquire(timeout=10), "the step waited for the next step's responses"
        responses = [Response(torch.tensor([5]), torch.tensor([-1.0]), False, version) for _ in prompts]
        for row, response in enumerate(responses):
            on_response(row, response)
        self.log.append(("end", version))
        return collect(prompts, responses, pad=0)

    def release(self):
        pass


@pytest.fixture
def one_step_off(material, single_process, monkeypatch):
    """Yield the rollout phase of a three-step run with one_step_off, and its engine."""
    settings = ["rollout.engine=servers", "rollout.servers=[http://127.0.0.1:9]", "rollout.one_step_off=true"]
    beside = Beside()
    monkeypatch.setattr(Run, "rollout_engine", lambda run, policy: beside)
    config = load_config(material / "config.yaml", [*settings, "algorithm.old_logp=recompute", "train.steps=3"])
    with Run(config) as run:
        engine = run.policy_engine(run.config.train.optimizer, temperature=1.0, total_updates=1)
        yield RolloutPhase(run, engine, Shares(16, 8, run.world), ValueTracker(run.config.algorithm.tracker)), beside
        beside.may_end.release()  # ends a call that a test left running


def test_one_step_off_each_step_trains_while_the_next_one_is_sampled(one_step_off):
    rollouts, engine = one_step_off
    clock, taken = Stopwatch(torch.device("cpu")), []
    for step in range(3):
        if step > 0:
            engine.may_end.release()  # only now: the last `take` returned before these responses were complete
        taken.append(rollouts.take(step, clock))
    assert [one.rollouts.weight_version.unique().tolist() for one in taken] == [[0], [0], [1]]
    assert [one.metrics(step, ALONE)["rollout/staleness"] for step, one in enumerate(taken)] == [0, 1, 1]
    assert engine.log == [
        ("sync", 0), ("generate", 0), ("end", 0),
        ("generate", 0), ("end", 0),
        ("sync", 1), ("generate", 1), ("end", 1),  # and nothing after the last step
    ]  # fmt: skip
    rows = [PromptSampler(64, 16, 0).rows(step) for step in range(3)]
    assert engine.asked == [(rows[step], noise_streams(0, "train", step, list(range(16)))) for step in range(3)]
    assert [[prompt.row for prompt in one.rollouts.prompts] for one in taken] == rows


def test_one_step_off_others_who_sample_wait_for_the_responses_on_their_way(one_step_off):
    """Validation, for example."""
    rollouts, engine = one_step_off
    rollouts.take(0, Stopwatch(torch.device("cpu")))
    end = threading.Timer(0.05, engine.may_end.release)  # if this is too early, the test checks less, but passes
    end.start()
    with rollouts.awake(1):
        assert engine.log == [("sync", 0), ("generate", 0), ("end", 0), ("generate", 0), ("end", 0), ("sync", 1)]
    end.join()


class Encodings:
    """Records which rows were encoded, in order of completion."""

    def __init__(self, monkeypatch) -> None:
        self.rows: list[int] = []
        self._changed = threading.Condition()
        encode = PromptEncoder.encode

        def recorded(encoder, row, index, source):
            prompt = encode(encoder, row, index, source)
            with self._changed:
                self.rows.append(index)
                self._changed.notify_all()
            return prompt

        monkeypatch.setattr(PromptEncoder, "encode", recorded)

    def wait_for(self, rows: list[int]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: set(rows) <= set(self.rows), timeout=60)


def test_a_step_finds_its_prompts_prepared(material, single_process, monkeypatch):
    encodings, before = Encodings(monkeypatch), set(threading.enumerate())
    with Run(load_config(material / "config.yaml", ["train.steps=5"])) as run:
        engine = run.policy_engine(run.config.train.optimizer, temperature=1.0, total_updates=1)
        rollouts = RolloutPhase(run, engine, Shares(16, 8, run.world), ValueTracker(run.config.algorithm.tracker))
        steps = [PromptSampler(64, 16, run.config.seed).rows(step) for step in range(5)]
        for step, rows in enumerate(steps):
            prompts = rollouts.take(step, Stopwatch(run.world.device)).rollouts.prompts
            assert [prompt.row for prompt in prompts] == rows
            if step + 1 < len(steps):
                encodings.wait_for(steps[step + 1])  # during this step
            # Only the first step encodes its own rows. No row is encoded twice, although step 5 sees old ones.
            assert sorted(encodings.rows) == sorted({row for ahead in steps[: step + 2] for row in ahead})
    left = set(threading.enumerate()) - before
    assert not [thread.name for thread in left if thread.name.startswith("prompts")]


def test_dynamic_sampling_prepares_the_next_step_again_after_a_refill(material, single_process, monkeypatch):
    """Loading the refill cancels what was prepared. Untrained, all rewards are equal: all prompts are replaced."""
    asked = []
    for name in ("load", "begin"):
        done = getattr(ProblemDataset, name)
        monkeypatch.setattr(
            ProblemDataset,
            name,
            lambda self, rows, name=name, done=done: asked.append((name, rows := list(rows))) or done(self, rows),
        )
    groups = ["algorithm.name=grpo", "rollout.prompts_per_step=4", "rollout.responses_per_prompt=4"]
    only = ["reward.function=math", "reward.weights={}"]
    config = load_config(material / "config.yaml", [*groups, "algorithm.dynamic_sampling=1", *only])
    with Run(config) as run:
        engine = run.policy_engine(run.config.train.optimizer, temperature=1.0, total_updates=1)
        rollouts = RolloutPhase(run, engine, Shares(16, 8, run.world), ValueTracker(run.config.algorithm.tracker))
        taken = rollouts.take(0, Stopwatch(run.world.device))
    sampler = PromptSampler(64, 4, run.config.seed)
    first, second = ([row for row in sampler.rows(step) for _ in range(4)] for step in (0, 1))
    assert taken.responses == 32
    assert [name for name, _ in asked] == ["load", "begin", "load", "begin"]
    assert asked[0][1] == first and not set(asked[2][1]) & set(first)
    assert asked[1][1] == asked[3][1] == second


def test_a_row_that_breaks_stops_the_step_that_needs_it(material, single_process, tmp_path):
    write_digits(tmp_path, seed=0, train=64, val=32, test=1, format="jsonl")
    with Run(load_config(material / "config.yaml", [f"data.train={tmp_path / 'train.jsonl'}"])) as run:
        engine = run.policy_engine(run.config.train.optimizer, temperature=1.0, total_updates=1)
        rollouts = RolloutPhase(run, engine, Shares(16, 8, run.world), ValueTracker(run.config.algorithm.tracker))
        clock = Stopwatch(run.world.device)
        row = PromptSampler(64, 16, run.config.seed).rows(1)[3]
        Path(open_rows(str(tmp_path / "train.jsonl"))[row]["images"][0]).unlink()
        assert len(rollouts.take(0, clock).rollouts) == 16
        with pytest.raises(BadRow, match=rf"train.jsonl, row {row}: image 1 of 1 .* No such file or directory"):
            rollouts.take(1, clock)
