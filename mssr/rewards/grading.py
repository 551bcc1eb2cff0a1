"""Grades the responses of a batch while others are still generated."""

import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mssr.batch import GradedRollouts, Prompt, Rollouts
from mssr.config.resolve import reward_workers
from mssr.config.reward_keys import ACCURACY, RewardConfig
from mssr.distributed import ALONE, World
from mssr.errors import UserError
from mssr.rewards.function import Function, handed_over, named
from mssr.rewards.outcome import Failure, Outcome
from mssr.rewards.pool import RewardPool
from mssr.rewards.reward import Grade, combine, refuse_unknown_parts
from mssr.rewards.row import Row
from mssr.rollout.base import Response

LOG = "reward.log"  # in run_dir: what the functions print, and tracebacks


def start_pools(config: RewardConfig, own: Callable | None, log: Path | None) -> dict[str, RewardPool]:
    """Start the workers of every reward function; return them by the functions' labels.

    own: a Python function, in the place of `reward.function`.

    Raises:
        UserError: a function cannot be found or imported, or does not take its options; the settings name a part that there
            is not, as far as that is known before the first call.
    """
    if own is not None:
        functions = [handed_over(own, label=ACCURACY)]
    else:
        if config.known_parts is not None:
            refuse_unknown_parts(config.known_parts, config)
        functions = [
            named(one.reference, label=label, options=one.options, timeout_s=one.timeout_s)
            for label, one in config.functions.items()
        ]
    pools = {}
    with ExitStack() as started:
        for function in functions:
            pools[function.label] = pool = _pool(function, config, log)
            started.callback(pool.close)
        started.pop_all()
    return pools


def _pool(function: Function, config: RewardConfig, log: Path | None) -> RewardPool:
    return RewardPool(
        function,
        workers=reward_workers(config.workers),
        timeout_s=config.timeout_s,
        memory_gib=config.memory_gib,
        batch_size=config.batch_size,
        log=log,
    )


@dataclass(frozen=True)
class GradingCost:
    """seconds: time in which a response was being graded, beside generation or not. timeouts, errors: calls that failed.

    in_function: seconds of all calls of each function, by its label.
    """

    seconds: float = 0.0
    timeouts: int = 0
    errors: int = 0
    in_function: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: "GradingCost") -> "GradingCost":
        return GradingCost(
            self.seconds + other.seconds,
            self.timeouts + other.timeouts,
            self.errors + other.errors,
            self.in_function + other.in_function,
        )

    @property
    def slowest(self) -> str:
        """Label of the function that took the most time."""
        return max(self.in_function, key=self.in_function.__getitem__, default="")


class Grader:
    """Judges responses by the run's reward functions: decodes them in one thread, which hands them to the workers.

    cost: of all batches so far.
    """

    def __init__(
        self,
        pools: Mapping[str, RewardPool],
        config: RewardConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int,
        world: World = ALONE,
        log: Path | None = None,
    ) -> None:
        """pools: by the functions' labels. max_tokens: of a response. log: for messages."""
        self.pools, self.config, self.world, self.log = pools, config, world, log
        self.cost = GradingCost()
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grader")
        self._said: set[tuple[str, str, str]] = set()  # label, kind of failure, type of exception
        self._answered: set[str] = set()  # labels of the functions that have returned something
        self._parts: set[str] = set()

    def begin(self, prompts: Sequence[Prompt], advance: Callable[[], None] = lambda: None) -> "Grading":
        """Start to grade a batch. advance: called for each response that was generated."""
        return Grading(self, prompts, advance)

    def submit(self, prompt: Prompt, tokens: Tensor, truncated: bool, grading: "Grading") -> Future:
        """Return a future of (text of the response, {label: future of the function's outcome}). tokens: [R] int64."""
        return self._thread.submit(self._call, prompt, tokens.tolist(), truncated, grading)

    def close(self) -> None:
        """End the thread. Whoever started the pools closes them."""
        self._thread.shutdown(cancel_futures=True)

    def _call(
        self, prompt: Prompt, tokens: list[int], truncated: bool, grading: "Grading"
    ) -> tuple[str, dict[str, Future[Outcome]]]:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        row = Row(
            problem=prompt.problem,
            answer=prompt.answer,
            prompt=prompt.rendered,
            tokens=len(tokens),
            max_tokens=self._max_tokens,
            truncated=truncated,
            columns=prompt.columns,
            image_files=prompt.images,
        )
        return text, {
            label: grading.timed(lambda pool=pool: pool.submit(text, row)) for label, pool in self.pools.items()
        }

    def learn(self, prompts: Sequence[Prompt], outcomes: list[dict[str, Outcome]], grades: list[Grade]) -> None:
        """Say each kind of failure once, and check the names of the parts as soon as all functions have returned some.

        Collective.

        Raises:
            UserError: the settings name a part that there is not.
        """
        news: dict[tuple[str, str, str], list] = {}
        for prompt, grade in zip(prompts, grades):
            for label, failure in grade.failures.items():
                # Of exceptions also the type: a second bug would hide behind the first.
                what = failure.message.partition(":")[0] if failure.kind == "error" else ""
                news.setdefault((label, failure.kind, what), [prompt.row, failure.message, 0])[2] += 1
        answered = {label for found in outcomes for label, outcome in found.items() if outcome.parts is not None}
        parts = {part for grade in grades for part in grade.parts}
        complete = self._answered >= self.pools.keys()
        for their_news, their_answered, their_parts in self.world.gather((news, answered, parts)):
            self._answered |= their_answered
            self._parts |= their_parts
            for key, (row, message, count) in their_news.items():
                self._say_once(key, row, message, count)
        if not complete and self._answered >= self.pools.keys():
            refuse_unknown_parts(self._parts, self.config)

    def _say_once(self, key: tuple[str, str, str], row: int, message: str, count: int) -> None:
        if key in self._said:
            return
        self._said.add(key)
        label, kind, _ = key
        if self.world.is_main:
            others = f" and {count - 1} more of this batch" if count > 1 else ""
            then = "get reward 0" if self.config.on_error == "zero" else "are left out of loss and tracker"
            counted = f"counted in reward/{'timeouts' if kind == 'timeout' else 'errors'}"
            print(
                f"mssr: reward function {label}, row {row}{others}: {message}: such responses {then} "
                f"(said once; {counted}{self.more})",
                file=sys.stderr,
                flush=True,
            )

    @property
    def more(self) -> str:
        """Where a failure's traceback is."""
        return f"; more in {self.log}" if self.log is not None and self.log.exists() else ""


class Grading:
    """Grades one batch. Called with (row, response) as responses complete: `on_response` of `RolloutEngine.generate`."""

    def __init__(self, grader: Grader, prompts: Sequence[Prompt], advance: Callable[[], None]) -> None:
        self.cost = GradingCost()
        self._grader, self._prompts, self._advance = grader, prompts, advance
        self._jobs: dict[int, Future] = {}
        self._lock = threading.Lock()
        self._open, self._since, self._seconds = 0, 0.0, 0.0

    def __call__(self, row: int, response: Response) -> None:
        self._advance()
        self._jobs[row] = self._grader.submit(self._prompts[row], response.tokens, response.truncated, self)

    def timed(self, call: Callable[[], Future[Outcome]]) -> Future[Outcome]:
        """Make the call, and count the time until its end."""
        with self._lock:
            if not self._open:
                self._since = time.monotonic()
            self._open += 1
        future = call()
        future.add_done_callback(self._ended)
        return future

    def _ended(self, _: Future) -> None:
        with self._lock:
            self._open -= 1
            if not self._open:
                self._seconds += time.monotonic() - self._since

    @property
    def _spent_s(self) -> float:
        with self._lock:
            return self._seconds + (time.monotonic() - self._since if self._open else 0.0)

    def finish(self, rollouts: Rollouts) -> GradedRollouts:
        """Return the rollouts with their rewards; what was not graded before is graded now. Collective.

        Raises:
            UserError: on all ranks: a function failed and `reward.on_error` is fail, or the parts do not fit the settings.
        """
        grader = self._grader
        deadline = time.monotonic() + grader.config.step_timeout_s
        with grader.world.together():
            for row, prompt in enumerate(self._prompts):
                if row not in self._jobs:
                    truncated = bool(rollouts.truncated[row])
                    self._jobs[row] = grader.submit(prompt, rollouts.response(row), truncated, self)
            texts, calls = (
                zip(*[self._jobs[row].result() for row in range(len(rollouts))]) if len(rollouts) else ((), ())
            )
            outcomes = [
                {label: self._outcome(call, calls, deadline) for label, call in found.items()} for found in calls
            ]
            grades = [combine(found, grader.config) for found in outcomes]
            if grader.config.on_error == "fail":
                self._refuse_failures(grades)
        self.cost = self._cost_of(outcomes, grades)
        grader.cost += self.cost
        grader.learn(self._prompts, outcomes, grades)
        return GradedRollouts(
            **vars(rollouts),
            reward=torch.tensor([grade.reward for grade in grades]),
            correct=torch.tensor([grade.success for grade in grades]),
            graded=torch.tensor([grade.graded for grade in grades], dtype=torch.bool),
            masked=torch.zeros(len(rollouts), dtype=torch.bool),
            parts=tuple(grade.parts for grade in grades),
            texts=tuple(texts),
        )

    def _outcome(
        self, call: Future[Outcome], calls: Sequence[Mapping[str, Future[Outcome]]], deadline: float
    ) -> Outcome:
        """Wait for an outcome. At the deadline all calls are cancelled: one that a worker is in ends."""
        with suppress(CancelledError):
            try:
                return call.result(max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                for found in calls:
                    for other in found.values():
                        other.cancel()
                return call.result()
        late = f"not called, because reward.step_timeout_s {self._grader.config.step_timeout_s:g} was over"
        return Outcome(None, Failure("timeout", late), 0.0)

    def _refuse_failures(self, grades: list[Grade]) -> None:
        for prompt, grade in zip(self._prompts, grades):
            for label, failure in grade.failures.items():
                raise UserError(
                    f"reward function {label}, row {prompt.row}: {failure.message}; fix it, or set reward.on_error=zero or "
                    f"skip{self._grader.more}"
                )

    def _cost_of(self, outcomes: list[dict[str, Outcome]], grades: list[Grade]) -> GradingCost:
        kinds = Counter(failure.kind == "timeout" for grade in grades for failure in grade.failures.values())
        in_function = Counter()
        for found in outcomes:
            in_function.update({label: outcome.seconds for label, outcome in found.items()})
        return GradingCost(self._spent_s, kinds[True], kinds[False], in_function)


def settle_truncated(rollouts: GradedRollouts, rule: Literal["graded", "masked", "failed"]) -> GradedRollouts:
    """Apply `rollout.truncated` to the responses that the token limit cut.

    graded: nothing changes. masked: the tracker sees the success, the loss leaves the response out. failed: reward and
    success are 0, whatever the functions say, also if they failed.
    """
    cut = rollouts.truncated
    if rule == "masked":
        return replace(rollouts, masked=cut)
    if rule == "failed":
        reward, correct = rollouts.reward.masked_fill(cut, 0.0), rollouts.correct.masked_fill(cut, 0.0)
        return replace(rollouts, reward=reward, correct=correct, graded=rollouts.graded | cut)
    return rollouts


def part_means(parts: Sequence[Mapping[str, float]], world: World) -> dict[str, float]:
    """Return the mean of each part over the responses of all ranks that have it. Collective."""
    sums: dict[str, list[float]] = {}
    for found in world.gather(parts):
        for one in found:
            for part, value in one.items():
                sums.setdefault(part, []).append(value)
    return {part: math.fsum(values) / len(values) for part, values in sums.items()}  # in any order of ranks
