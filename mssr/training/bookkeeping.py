"""Everything in a run that is not the algorithm: metrics, costs, skipped steps, and when to save."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor

from mssr.batch import GradedRollouts, UpdateBatch
from mssr.errors import Diverged, Interrupted, UserError, shortened
from mssr.observe.metrics import Metric
from mssr.observe.progress import TrainProgress
from mssr.observe.step import SlowGrading
from mssr.policy.engine import PolicyEngine, UpdateStats
from mssr.rollout.gap import LogpGap
from mssr.stopwatch import Stopwatch
from mssr.training.costs import Costs
from mssr.training.rollout_phase import StepRollouts
from mssr.training.run import Run
from mssr.training.session import Session
from mssr.training.skipping import SkippedSteps
from mssr.training.tracking import refuse_missing_start

OnStep = Callable[[int, dict[str, Metric]], Any]


class Bookkeeping(AbstractContextManager):
    """One object per run. Call every method on all ranks.

    on_step: as for `mssr.training.loop.train`.
    is_new: there is no checkpoint to resume from.
    costs: what the run has spent.
    """

    def __init__(self, run: Run, *, on_step: OnStep | None = None, resume: bool) -> None:
        self._run, self._config = run, run.config
        self._on_step, self._stopped = on_step, False
        self._session = Session(run, "train", resume=resume)
        self.is_new = self._session.saved is None
        self.costs = Costs()
        self._skipped = SkippedSteps(run.config.train.max_skipped_steps, run.config.rollout.max_gap)
        self._why_skipped: str | None = None
        self._grading = SlowGrading()

    def start(self, engine: PolicyEngine, parts: dict[str, Any]) -> int:
        """Restore the checkpoint, if there is one, and open the metrics. Return the number of steps done.

        parts: everything else to save and restore by name, each with state_dict and load_state_dict.
        """
        if self._session.saved is not None:
            refuse_missing_start(self._config.algorithm, self._session.saved)
        parts = parts | {"skipped": self._skipped, "costs": self.costs}
        self._first_step = self._session.start(engine, self._run.problems, parts)
        if not self.is_new and self._first_step >= self._config.train.steps:
            self._session.say_nothing_to_do(
                self._first_step, f"train.steps is {self._config.train.steps}; raise it to train on"
            )
        elif self._budget_spent:
            self._session.say_nothing_to_do(self._first_step, "train.budget is spent; raise it to train on")
        return self._first_step

    def record_start(self, metrics: dict[str, Metric]) -> None:
        """Record step 0 of a new run: the validation before training, and the cost of the tracker's first rollouts."""
        self._run.record(0, metrics | self.costs.metrics())
        self.costs.refuse_no_step(self._config.train.budget)
        self._session.save_and_end_if_asked(0)

    @contextmanager
    def progress(self) -> Iterator[Iterator[int]]:
        """Show the live display; yield the steps to take, until the last one or the end of the budget.

        A run that ends earlier leaves its curves: after a signal, or because it diverged.
        """
        config, activity = self._config, self._run.activity
        enabled = self._run.world.is_main
        display = TrainProgress(str(config.run_dir), config.train.steps, self._first_step, enabled=enabled)
        try:
            with self._session.steps(), display, activity.within(display):
                self._display = display
                yield (step for step in range(self._first_step, config.train.steps) if not self._has_ended)
        except (Diverged, Interrupted):  # on all ranks
            self._run.draw_curves()
            raise
        activity.say(f"saving {config.run_dir / 'model'}")

    def count(
        self, done: int, gap: LogpGap, updates: list[UpdateStats], sampled: StepRollouts, clock: Stopwatch
    ) -> dict[str, float]:
        """Count the step's costs and skipped updates; return their metrics."""
        self._gap, self._why_skipped = gap, self._skipped.observe(gap, updates)
        self._slowest_reward = sampled.grading.slowest
        self.costs.spend(
            self._run.world,
            updates=len(updates),
            rollouts=sampled.responses,
            tokens=sampled.tokens,
            seconds=clock.total,
        )
        if self._why_skipped:
            self._display.note(f"step {done}: {self._why_skipped}")
        return self._skipped.metrics() | self.costs.metrics()

    def validates(self, done: int) -> bool:
        return done % self._config.eval.every == 0 or self._is_last(done)

    def end_step(
        self,
        done: int,
        metrics: dict[str, Metric],
        rollouts: GradedRollouts,
        baseline: Tensor | None,
        batch: UpdateBatch,
    ) -> None:
        """Record the step, its sample of rollouts, and a checkpoint if one is due.

        Raises:
            Diverged: too many steps were skipped.
            Interrupted: a signal ended the run; the step is saved.
            Exception: what on_step raised; the step is saved.
        """
        config = self._config
        self._run.record(done, metrics)
        if warning := self._grading.warning(metrics, self._slowest_reward):
            self._display.note(f"step {done}: {warning}")
        self._display.update(done, metrics)
        if self._why_skipped:
            self._session.checkpoints.settle(wait=True)
            self._skipped.refuse_to_go_on(done, self._gap, self._why_skipped)
        if done % config.log.rollouts_every == 0:
            self._run.save_rollouts(done, rollouts, baseline, batch.advantage)
        failed = self._tell(done, metrics)
        accuracy = metrics.get("val/accuracy")
        is_best = config.train.keep_best and accuracy is not None and self._session.checkpoints.is_best(accuracy)
        due = self._session.checkpoints.due(done) or is_best
        self._session.save_and_end_if_asked(done, due=due, best=accuracy if is_best else None, last=self._is_last(done))
        if failed:
            raise failed

    def _tell(self, done: int, metrics: dict[str, Metric]) -> Exception | None:
        """Call on_step on rank 0; the run ends if it returns False or fails. Return the error to raise, on every rank."""
        if self._on_step is None:
            return None
        world, failed, stop = self._run.world, None, False
        if world.is_main:
            try:
                stop = self._on_step(done, dict(metrics)) is False
            except Exception as error:
                failed = error
        said, self._stopped = world.gather(
            (failed and f"{type(failed).__name__}: {failed}", stop or failed is not None)
        )[0]
        if said and failed is None:
            failed = UserError(f"step {done}: on_step failed on rank 0: {shortened(said)}")
        return failed

    @property
    def _budget_spent(self) -> bool:
        return self.costs.reach(self._config.train.budget)

    @property
    def _has_ended(self) -> bool:
        return self._stopped or self._budget_spent

    def _is_last(self, done: int) -> bool:
        return done == self._config.train.steps or self._has_ended

    def __exit__(self, *error) -> None:
        self._session.__exit__(*error)
