"""The rollouts of each training step: sampled when the step begins, or one step ahead, beside the training.

In turn (the default):      sync(k)  generate(k)  train(k)               sync(k+1)  generate(k+1)  train(k+1) ...
One step off (on servers):  sync(k)  train(k) beside generate(k+1)       sync(k+1)  train(k+1) beside generate(k+2) ...

One step off, step k trains on what the weights of step k-1 sampled: staleness exactly 1 (0 for the first batch), for
which recomputed old log-probs and truncated importance weights correct.

A prompt has `rollout.responses_per_prompt` responses, side by side in the global batch. Under dynamic sampling (DAPO, arXiv
2503.14476) a prompt whose responses all earned the same makes room for another one, a round at a time.
"""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from mssr.algorithms.advantages import zero_variance
from mssr.algorithms.prompt_sampling import PrioritisedSampler
from mssr.algorithms.value_tracker import ValueTracker
from mssr.batch import Prompt, RolloutBatch
from mssr.data.sampler import PromptSampler
from mssr.errors import UserError
from mssr.policy.engine import PolicyEngine
from mssr.rewards.grading import Grading, settle_truncated
from mssr.rollout.base import RolloutEngine, noise_streams
from mssr.rollout.lengths import ResponseLengths
from mssr.stopwatch import Stopwatch
from mssr.training.run import Run
from mssr.training.shares import Shares


@dataclass(frozen=True, eq=False)
class StepBatch:
    """This rank's share of a step.

    batch: with rewards. texts: the responses, decoded. seconds: of its generation, whatever the loop waited for it.
    rollouts, tokens: responses that were generated for it and their tokens, also those that were then replaced.
    """

    batch: RolloutBatch
    texts: list[str]
    seconds: float
    rollouts: int
    tokens: int

    def metrics(self, step: int) -> dict[str, float]:
        """perf/rollout_seconds: of this rank's generation. perf/generate_seconds is what the step waited for it: less, one
        step off. rollout/staleness: steps that the policy was trained for since it sampled these responses."""
        staleness = (step - self.batch.weight_version).double().mean()
        return {"perf/rollout_seconds": self.seconds, "rollout/staleness": float(staleness)}


_Asked = tuple[list[Prompt], list[int], list[float]]  # prompts, noise streams, expected lengths


@dataclass(frozen=True, eq=False)
class _Sampled:
    batch: RolloutBatch
    grading: Grading
    seconds: float


class StepRollouts:
    """Owns the sampler: makes room for it, gives it the weights, and asks it for each step's batch.

    lengths: of past responses, which decide what is begun first; part of a checkpoint.
    """

    def __init__(self, run: Run, engine: PolicyEngine, share: Shares, tracker: ValueTracker) -> None:
        """tracker: of every prompt's value, for prioritised sampling."""
        self.lengths = ResponseLengths()
        self._run, self._engine, self._share = run, engine, share
        self._config = run.config.rollout
        self._rounds = run.config.algorithm.dynamic_sampling
        count, seed = self._config.prompts_per_step, run.config.seed
        self._prioritised = run.config.algorithm.prompt_sampling == "prioritised"
        if self._prioritised:
            self._rows = PrioritisedSampler(run.problems.keys, tracker, count, seed)
        else:
            self._rows = PromptSampler(len(run.problems), count, seed)
        self._rollout = run.rollout_engine(engine.policy)
        self._beside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollout")
        self._next: Future[_Sampled] | None = None

    @contextmanager
    def awake(self, version: int, clock: Stopwatch | None = None) -> Iterator[RolloutEngine]:
        """The sampler, with the policy's weights as they are now, `version` steps old; its memory is given back after."""
        if self._next is not None:
            wait([self._next])  # the sampler does one thing at a time
        with self._engine.optimizer_offloaded() if self._config.offload_optimizer else nullcontext():
            with clock("sync") if clock else nullcontext():
                self._rollout.update_weights(self._engine.policy, version)
            yield self._rollout
            self._rollout.release()

    def take(self, step: int, clock: Stopwatch) -> StepBatch:
        """The step's batch. One step off, the next one's generation begins.

        Raises:
            UserError: the batch was sampled from other weights than this step's (or, one step off, the last one's).
        """
        coming, self._next = self._next, None
        if coming is None:
            rows = self._rows.rows(step)
            seen = set(rows)
            with clock("data"):
                asked = self._asked(step, rows)
            with self.awake(step, clock):
                taken = self._answered(asked, clock)
                for round in range(self._rounds):
                    taken = self._refilled(taken, rows, seen, step, round, clock)
                if self._rounds:
                    self.prepare(step + 1)  # loading a refill ended what `_asked` had begun
        else:
            with clock("generate"):
                sampled = coming.result()
            taken = self._judged(sampled, clock)
        batch = taken.batch
        refuse_other_weights(batch, step, version=step if coming is None else step - 1)
        self.lengths.observe(self._share.gather_list(batch.keys), self._share.gather(batch.lengths).tolist())
        if self._config.one_step_off and step + 1 < self._run.config.train.steps:
            with clock("data"):
                asked = self._asked(step + 1, self._rows.rows(step + 1))
            with clock("sync"):
                if coming is not None:  # else they are this step's already
                    self._rollout.update_weights(self._engine.policy, step)
            self._next = self._beside.submit(self._generate, *asked)
        return taken

    def _answered(self, asked: _Asked, clock: Stopwatch) -> StepBatch:
        with clock("generate"):
            sampled = self._generate(*asked)
        return self._judged(sampled, clock)

    def _judged(self, sampled: _Sampled, clock: Stopwatch) -> StepBatch:
        with clock("reward"):
            batch, texts = sampled.grading.finish(sampled.batch)
        batch = settle_truncated(batch, self._config.truncated)
        return StepBatch(batch, texts, sampled.seconds, len(batch), int(batch.lengths.sum()))

    def _refilled(
        self, taken: StepBatch, rows: list[int], seen: set[int], step: int, round: int, clock: Stopwatch
    ) -> StepBatch:
        """Prompts whose responses all earned the same, replaced by others. After the last round such prompts stay: their
        advantages are 0. A collective.

        rows: of the step's prompts, and seen: all that it ever had; both are kept up to date.
        """
        group = self._config.responses_per_prompt
        silent = zero_variance(self._share.gather(taken.batch.reward), group)
        replaced = [prompt for prompt in range(len(rows)) if silent[prompt * group]]
        if not replaced:
            return taken
        for prompt, row in zip(replaced, self._rows.refill(step, seen, len(replaced), round)):
            rows[prompt] = row
            seen.add(row)
        own = [place for place, slot in enumerate(self._share.slots) if silent[slot]]
        slots = [self._share.slots[place] for place in own]
        with clock("data"):
            prompts = self._run.problems.load(rows[slot // group] for slot in slots)
        streams = noise_streams(self._run.config.seed, f"refill {round}", step, slots)
        others = self._answered((prompts, streams, self.lengths.expected([prompt.key for prompt in prompts])), clock)
        texts = list(taken.texts)
        for place, text in zip(own, others.texts):
            texts[place] = text
        return StepBatch(
            taken.batch.with_rows(own, others.batch) if own else taken.batch,
            texts,
            taken.seconds + others.seconds,
            taken.rollouts + others.rollouts,
            taken.tokens + others.tokens,
        )

    def _asked(self, step: int, rows: list[int]) -> _Asked:
        """The step's prompts, noise streams and expected lengths; all collectives and data work of a generation."""
        prompts = self._run.problems.load(self._own(rows))
        self.prepare(step + 1)
        streams = noise_streams(self._run.config.seed, "train", step, self._share.slots)
        return prompts, streams, self.lengths.expected([prompt.key for prompt in prompts])

    def prepare(self, step: int) -> None:
        """Begins to prepare the prompts of the step that comes next, beside what is done until then.

        Prioritised sampling chooses them by what this step teaches the tracker: then there is nothing to begin with.
        """
        if step < self._run.config.train.steps and not self._prioritised:
            self._run.problems.begin(self._own(self._rows.rows(step)))

    def _own(self, rows: list[int]) -> list[int]:
        """The row of each of this rank's responses, given the row of every prompt of the step."""
        return [rows[slot // self._config.responses_per_prompt] for slot in self._share.slots]

    def _generate(self, prompts: list[Prompt], streams: list[int], expected: list[float]) -> _Sampled:
        started = time.perf_counter()
        grading = self._run.grader.begin(prompts)
        batch = self._rollout.generate(
            prompts, streams, self._config.temperature, expected_tokens=expected, on_response=grading
        )
        return _Sampled(batch, grading, time.perf_counter() - started)


def refuse_other_weights(batch: RolloutBatch, step: int, version: int) -> None:
    """Raises:
    UserError: a response was sampled from weights that are not `version` steps old: a sync was missed.
    """
    others = batch.weight_version[batch.weight_version != version]
    if len(others):
        raise UserError(
            f"step {step + 1}: {len(others)} responses were sampled from the weights of step {int(others[0])}, not "
            f"{version}: the weight sync missed one; report it, with the rollout engine and its version"
        )
