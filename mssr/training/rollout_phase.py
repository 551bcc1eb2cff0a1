"""Rollout phase of a training step: sync weights, generate, grade, and replace groups without a gradient.

In turn (default):          sync(k)  generate(k)  train(k)               sync(k+1)  generate(k+1)  train(k+1) ...
One step off (servers):     sync(k)  train(k) beside generate(k+1)       sync(k+1)  train(k+1) beside generate(k+2) ...

One step off, step k trains on samples of the weights of step k-1: staleness is exactly 1 (0 for the first batch).
Recomputed old log-probs and truncated importance weights correct for it.

Each prompt has `rollout.responses_per_prompt` responses, adjacent in the global batch. Dynamic sampling (DAPO, arXiv
2503.14476) replaces prompts whose responses all get the same reward, in several rounds.
"""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from mssr.algorithms.advantages import zero_variance
from mssr.algorithms.prompt_sampling import PrioritisedSampler
from mssr.algorithms.value_tracker import ValueTracker
from mssr.batch import GradedRollouts, Prompt, Rollouts
from mssr.data.sampler import PromptSampler
from mssr.data.solved import UnsolvedSampler
from mssr.distributed import World
from mssr.errors import UserError
from mssr.policy.engine import PolicyEngine
from mssr.rewards.grading import Grading, GradingCost, part_means, settle_truncated
from mssr.rollout.base import RolloutEngine, noise_streams
from mssr.rollout.lengths import ResponseLengths
from mssr.stopwatch import Stopwatch
from mssr.training.run import Run
from mssr.training.shares import Shares


@dataclass(frozen=True, eq=False)
class StepRollouts:
    """Rollouts of a step on this rank, and their cost.

    seconds: generation time, even if the loop did not wait for all of it.
    responses, tokens, grading: of everything generated, including replaced responses.
    """

    rollouts: GradedRollouts
    seconds: float
    responses: int
    tokens: int
    grading: GradingCost

    def metrics(self, step: int, world: World) -> dict[str, float]:
        """Return perf/rollout_seconds, perf/grading_seconds, reward/* and rollout/staleness, the age of the weights in steps.

        perf/rollout_seconds is generation time on this rank; perf/generate_seconds is the wait, shorter one step off.
        perf/grading_seconds is the time of the reward on the slowest rank; perf/reward_seconds is the wait for it after
        generation. reward/timeouts, reward/errors: calls of the reward functions on all ranks that were late or failed.
        reward/PART: mean of each part over the step's responses that have it.
        """
        staleness = (step - self.rollouts.weight_version).double().mean()
        timeouts, errors = world.sum(torch.tensor([self.grading.timeouts, self.grading.errors])).tolist()
        return {
            "perf/rollout_seconds": self.seconds,
            "perf/grading_seconds": float(world.max(torch.tensor(self.grading.seconds, dtype=torch.float64))),
            "reward/timeouts": float(timeouts),
            "reward/errors": float(errors),
            **{f"reward/{part}": mean for part, mean in part_means(self.rollouts.parts, world).items()},
            "rollout/staleness": float(staleness),
        }


Request = tuple[list[Prompt], list[int]]  # prompts to answer in one call, and their noise streams


@dataclass(frozen=True, eq=False)
class _Sampled:
    rollouts: Rollouts
    grading: Grading
    seconds: float


class RolloutPhase:
    """Owns the sampler: makes room for it, syncs its weights, and returns each step's rollouts.

    lengths: of past responses, to start the longest expected ones first.
    parts: what belongs in a checkpoint, by name, each with state_dict and load_state_dict.
    """

    def __init__(self, run: Run, engine: PolicyEngine, share: Shares, tracker: ValueTracker) -> None:
        """tracker: for prioritised sampling, and to leave out what is solved."""
        self.lengths = ResponseLengths()
        self._run, self._engine, self._share = run, engine, share
        self._config = run.config.rollout
        self._rounds = run.config.algorithm.dynamic_sampling
        count, seed = self._config.prompts_per_step, run.config.seed
        self._prioritised = run.config.algorithm.prompt_sampling == "prioritised"
        problems, solved = run.problems, run.config.data.drop_solved
        if self._prioritised:
            self._rows = PrioritisedSampler(problems.keys, tracker, count, seed, problems.parts)
        elif solved is not None:
            self._rows = UnsolvedSampler(problems.keys, tracker, solved, count, seed, problems.parts)
        else:
            self._rows = PromptSampler(len(problems), count, seed, problems.parts)
        self.parts: dict[str, Any] = {"lengths": self.lengths}
        if isinstance(self._rows, UnsolvedSampler):
            self.parts["solved"] = self._rows
        self._rollout = run.rollout_engine(engine.policy)
        self._beside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollout")
        self._next: Future[_Sampled] | None = None

    @contextmanager
    def awake(self, version: int, clock: Stopwatch | None = None) -> Iterator[RolloutEngine]:
        """Yield the sampler with the policy's weights after `version` steps; release its memory afterwards."""
        if self._next is not None:
            wait([self._next])  # the sampler handles one request at a time
        with self._engine.optimizer_offloaded() if self._config.offload_optimizer else nullcontext():
            with clock("sync") if clock else nullcontext():
                self._rollout.update_weights(self._engine.policy, version)
            yield self._rollout
            self._rollout.release()

    def take(self, step: int, clock: Stopwatch) -> StepRollouts:
        """Return the step's rollouts. One step off, also start the next step's generation.

        Raises:
            UserError: they were not sampled from this step's weights (one step off: the previous step's).
        """
        coming, self._next = self._next, None
        if coming is None:
            taken = self._now(step, clock)
        else:
            with clock("generate"):
                sampled = coming.result()
            taken = self._graded(sampled, clock)
        rollouts = taken.rollouts
        refuse_other_weights(rollouts, step, version=step if coming is None else step - 1)
        keys = self._share.gather_list(rollouts.keys)
        self.lengths.observe(keys, self._share.gather(rollouts.lengths).tolist())
        if isinstance(self._rows, UnsolvedSampler):
            self._rows.observe(keys)
        if self._config.one_step_off and step + 1 < self._run.config.train.steps:
            with clock("data"):
                request = self._request(step + 1, self._rows.rows(step + 1))
            with clock("sync"):
                if coming is not None:  # otherwise the sampler already has this step's weights
                    self._rollout.update_weights(self._engine.policy, step)
            self._next = self._beside.submit(self._generate, request)
        return taken

    def begin(self, step: int) -> None:
        """Prepare the first step, new or resumed."""
        self.drop_solved(step)
        self._report()
        self.prepare(step)

    def drop_solved(self, step: int) -> dict[str, float]:
        """Decide which rows are solved in the epochs that may be asked for in `step`. Call it before the step, after the
        tracker has seen the one before. Return data/solved, the number of rows that are left out, if any can be.
        """
        if not isinstance(self._rows, UnsolvedSampler):
            return {}
        were_all = self._rows.all_solved
        # One step ahead is prepared; with servers its prompts are already answered, and the next one's prepared.
        if self._rows.decide(step + (2 if self._config.one_step_off else 1)):
            self._report()
        if self._rows.all_solved and not were_all:
            self._run.activity.say(
                f"data.drop_solved: all prompts but {self._config.prompts_per_step}, those of a step, are left out; "
                "these are drawn in every step from now on"
            )
        return {"data/solved": float(len(self._rows.solved))}

    def _report(self) -> None:
        solved = self._rows.solved if isinstance(self._rows, UnsolvedSampler) else None
        self._run.report_data(self._run.problems, solved)

    def _now(self, step: int, clock: Stopwatch) -> StepRollouts:
        rows = self._rows.rows(step)
        seen = set(rows)
        with clock("data"):
            request = self._request(step, rows)
        with self.awake(step, clock):
            taken = self._answer(request, clock)
            for round in range(self._rounds):
                taken = self._refill(taken, rows, seen, step, round, clock)
            if self._rounds:
                self.prepare(step + 1)  # again, because loading a refill cancels it
        return taken

    def _answer(self, request: Request, clock: Stopwatch) -> StepRollouts:
        with clock("generate"):
            sampled = self._generate(request)
        return self._graded(sampled, clock)

    def _graded(self, sampled: _Sampled, clock: Stopwatch) -> StepRollouts:
        with clock("reward"):
            graded = sampled.grading.finish(sampled.rollouts)
        graded = settle_truncated(graded, self._config.truncated)
        tokens = int(graded.lengths.sum())
        return StepRollouts(graded, sampled.seconds, len(graded), tokens, sampled.grading.cost)

    def _refill(
        self, taken: StepRollouts, rows: list[int], seen: set[int], step: int, round: int, clock: Stopwatch
    ) -> StepRollouts:
        """Replace prompts whose responses all get the same reward. Collective.

        After the last round such prompts stay, with advantage 0.
        rows: of the step's prompts. seen: all rows that the step has had so far. Both are updated.
        """
        group = self._config.responses_per_prompt
        reward, graded = (self._share.gather(values) for values in (taken.rollouts.reward, taken.rollouts.graded))
        equal = zero_variance(reward, graded, group)
        replaced = [prompt for prompt in range(len(rows)) if equal[prompt * group]]
        if not replaced:
            return taken
        for prompt, row in zip(replaced, self._rows.refill(step, seen, len(replaced), round)):
            rows[prompt] = row
            seen.add(row)
        own = [place for place, slot in enumerate(self._share.slots) if equal[slot]]
        slots = [self._share.slots[place] for place in own]
        with clock("data"):
            request = self._load(rows, slots, f"refill {round}", step)
        others = self._answer(request, clock)
        return StepRollouts(
            taken.rollouts.with_rows(own, others.rollouts) if own else taken.rollouts,
            taken.seconds + others.seconds,
            taken.responses + others.responses,
            taken.tokens + others.tokens,
            taken.grading + others.grading,
        )

    def _request(self, step: int, rows: list[int]) -> Request:
        """Load the step's prompts, and start to prepare the next step's."""
        request = self._load(rows, self._share.slots, "train", step)
        self.prepare(step + 1)
        return request

    def _load(self, rows: list[int], slots: list[int], purpose: str, step: int) -> Request:
        """Load the prompt of each slot. rows: of every prompt of the step. purpose: tells noise streams apart."""
        prompts = self._run.problems.load(self._rows_of(rows, slots))
        return prompts, noise_streams(self._run.config.seed, purpose, step, slots)

    def prepare(self, step: int) -> None:
        """Start to prepare the prompts of `step` in the background.

        Not with prioritised sampling, which needs the tracker's state after the step before.
        """
        if step < self._run.config.train.steps and not self._prioritised:
            self._run.problems.begin(self._rows_of(self._rows.rows(step), self._share.slots))

    def _rows_of(self, rows: list[int], slots: list[int]) -> list[int]:
        """Return the row of each slot. rows: of every prompt of the step."""
        return [rows[slot // self._config.responses_per_prompt] for slot in slots]

    def _generate(self, request: Request) -> _Sampled:
        started = time.perf_counter()
        prompts, streams = request
        expected = self.lengths.expected([prompt.key for prompt in prompts])
        grading = self._run.grader.begin(prompts)
        rollouts = self._rollout.generate(
            prompts,
            streams,
            self._config.temperature,
            top_p=self._config.top_p,
            top_k=self._config.top_k,
            expected_tokens=expected,
            on_response=grading,
        )
        return _Sampled(rollouts, grading, time.perf_counter() - started)


def refuse_other_weights(rollouts: Rollouts, step: int, version: int) -> None:
    """Check that every response was sampled from the weights after `version` steps.

    Raises:
        UserError: a weight sync was missed.
    """
    others = rollouts.weight_version[rollouts.weight_version != version]
    if len(others):
        raise UserError(
            f"step {step + 1}: {len(others)} responses were sampled from the weights of step {int(others[0])}, not "
            f"{version}: the weight sync missed one; report it, with the rollout engine and its version"
        )
