"""The training loop: one step of the method (arXiv 2512.18215), top to bottom.

    weights to the sampler -> prompts -> one rollout each -> rewards -> baseline -> advantages -> updates -> value tracker

One response per prompt: no groups, no critic, no replay. The tracker remembers what other rollouts of a prompt would tell.
The algorithms that MSSR is compared with run in the same loop: those with groups sample several responses per prompt and
have no tracker.
"""

from contextlib import nullcontext

from mssr.algorithms.advantages import ALGORITHMS
from mssr.algorithms.value_tracker import ValueTracker
from mssr.batch import UpdateBatch
from mssr.config import Config
from mssr.config.resolve import policy_loss
from mssr.observe.step import outcome_metrics, step_metrics
from mssr.observe.utilisation import peak_tflops, utilisation, work_of_step
from mssr.policy.export import save_model
from mssr.policy.loss import PolicyGradient
from mssr.policy.reference import make_reference
from mssr.rollout.gap import measure_gap
from mssr.stopwatch import Stopwatch
from mssr.training.bookkeeping import Bookkeeping
from mssr.training.rollout_phase import RolloutPhase
from mssr.training.run import Run
from mssr.training.shares import Shares
from mssr.training.tracking import drift_of_previous_responses, initialise_tracker, refuse_missing_start, track


def train(config: Config, *, resume: bool = False) -> None:
    """Train `config.model.path` by RL; all outputs are in `config.run_dir`.

    resume: continue from the newest checkpoint. On a CPU the resumed run equals an uninterrupted one exactly.

    Raises:
        UserError: the run cannot start (model, data, an earlier run in the folder) or go on (disk, log-prob gap).
        Interrupted: a signal asked for the end; the last step is saved.
    """
    with Run(config) as run, Bookkeeping(run, resume=resume) as book:
        _train(run, book)


def _train(run: Run, book: Bookkeeping) -> None:
    config, world = run.config, run.world
    algorithm = ALGORITHMS[config.algorithm.name]
    share = Shares(config.responses_per_step, config.train.responses_per_update, world)
    engine = run.policy_engine(
        config.train.optimizer,
        temperature=config.rollout.temperature,
        total_updates=config.total_updates,
    )
    tracker = ValueTracker(config.algorithm.tracker)
    rollout_phase = RolloutPhase(run, engine, share, tracker)
    loss = PolicyGradient(policy_loss(config.algorithm))
    recompute = config.algorithm.old_logp == "recompute"
    peak = peak_tflops(world.device, config.log.peak_tflops)
    reference = make_reference(config.algorithm, config.model, engine)

    is_new = book.saved is None
    if not is_new:
        refuse_missing_start(config.algorithm, book.saved["tracker"])
    rollout_phase.prepare(book.start(engine, {"tracker": tracker, "lengths": rollout_phase.lengths}))
    if is_new:
        with rollout_phase.awake(0) as sampler:
            metrics = run.validate(sampler)
            if algorithm.tracked:
                clock = Stopwatch(world.device)
                responses, tokens = initialise_tracker(tracker, run, sampler)
                book.costs.spend(world, updates=0, rollouts=responses, tokens=tokens, seconds=clock.total)
        book.record_start(metrics)

    with book.progress() as steps:
        for step in steps:
            clock = Stopwatch(world.device)

            # One response per prompt (or a group of them), and its reward.
            sampled = rollout_phase.take(step, clock)
            rollouts = sampled.rollouts

            # The baseline is read before the tracker sees these rewards; A is normalised over the whole batch.
            baseline = tracker.values(rollouts.keys) if algorithm.tracked else None
            outcomes = share.outcomes(rollouts, baseline, config.rollout.responses_per_prompt)
            advantage = share.own(algorithm.advantages(outcomes))

            if algorithm.tracked:
                with clock("drift") if tracker.wants_responses else nullcontext():
                    drift = drift_of_previous_responses(tracker, engine, rollouts.prompts)
            with clock("old_logp") if recompute else nullcontext():
                old_logp = engine.score(rollouts) if recompute else rollouts.logp
            with clock("reference") if reference else nullcontext():
                ref_logp = reference.score(engine, rollouts) if reference else None
            batch = UpdateBatch(
                rollouts.prompts, rollouts.tokens, rollouts.mask,
                rollouts.loss_mask, rollouts.logp, advantage, old_logp, ref_logp,
            )  # fmt: skip

            # Entropy shaping, clipping and the KL term are inside the fused loss. The first update's log-probs come from the
            # weights that sampled (one step off: from the next ones). If the sampler disagrees, no update is made.
            first, *rest = share.updates(batch)
            accumulated = engine.accumulate(first, loss, clock)
            gap = measure_gap(accumulated.logp, first.logp, first.loss_mask, world)
            agrees = gap.within(config.rollout.max_gap)
            if agrees:
                updates = [engine.step(accumulated, clock), *(engine.update(part, loss, clock) for part in rest)]
            else:
                updates = [engine.discard(accumulated, clock)]

            metrics = step_metrics(rollouts, updates, gap, clock, world) | sampled.metrics(step)
            if agrees:
                metrics |= utilisation(work_of_step(engine.policy, config.model, batch, updates), clock, world, peak)
            metrics |= outcome_metrics(outcomes)
            if algorithm.tracked and any(update.applied for update in updates):
                metrics |= track(tracker, share, rollouts, batch, outcomes.reward, drift, updates)

            done = step + 1
            metrics |= book.count(done, gap, updates, sampled, clock)
            if book.validates(done):
                with rollout_phase.awake(done) as sampler:
                    metrics |= run.validate(sampler)
            book.end_step(done, metrics, gap, rollouts, baseline, batch)

    save_model(engine.policy, run.processors, config.run_dir / "model", world)
