"""The training loop: one step of the method (arXiv 2512.18215), top to bottom.

    weights to the sampler -> prompts -> one rollout each -> rewards -> baseline -> advantages -> updates -> value tracker

MSSR samples one response per prompt: no groups, no critic, no replay. The value tracker provides the baseline, from the
rewards of earlier rollouts of the prompt. The algorithms that MSSR is compared with run in the same loop; those with groups
sample several responses per prompt and have no tracker.
"""

from collections.abc import Callable

from mssr.algorithms.advantages import ALGORITHMS
from mssr.algorithms.value_tracker import ValueTracker
from mssr.batch import UpdateBatch
from mssr.config import Config
from mssr.config.resolve import policy_loss
from mssr.distributed import own_environment
from mssr.observe.step import outcome_metrics, step_metrics
from mssr.observe.utilisation import peak_tflops, utilisation, work_of_step
from mssr.policy.loss import PolicyGradient
from mssr.policy.reference import make_reference
from mssr.rollout.gap import measure_gap
from mssr.stopwatch import Stopwatch
from mssr.training.bookkeeping import Bookkeeping, OnStep
from mssr.training.ending import finish
from mssr.training.rollout_phase import RolloutPhase
from mssr.training.run import Run
from mssr.training.shares import Shares
from mssr.training.summary import Summary
from mssr.training.tracking import drift_of_previous_responses, initialise_tracker, track


def train(
    config: Config, *, reward: Callable | None = None, on_step: OnStep | None = None, resume: bool = False
) -> Summary:
    """Train `config.model.path` by RL; all outputs go to `config.run_dir`. Return what the run reached, on every rank.

    reward: a function in the place of `reward.function`.
    on_step: called as `on_step(step, metrics)` on rank 0, when the step is in metrics.jsonl. If it returns False, the run
        ends with this step and saves the model, without another validation. An error in it ends the run, after the
        step is saved.
    resume: continue from the newest checkpoint. On a CPU the resumed run equals an uninterrupted one exactly.

    Raises:
        UserError: the run cannot start (model, data, an earlier run in the folder) or continue (disk, log-prob gap).
        Interrupted: a signal ended the run; the last step is saved.
    """
    with own_environment(), Run(config, reward) as run, Bookkeeping(run, on_step=on_step, resume=resume) as book:
        return _train(run, book)


def _train(run: Run, book: Bookkeeping) -> Summary:
    config, world = run.config, run.world
    algorithm = ALGORITHMS[config.algorithm.name]
    share = Shares(config.responses_per_step, config.train.responses_per_update, world)
    engine = run.policy_engine(
        config.train.optimizer, temperature=config.rollout.temperature, total_updates=config.total_updates
    )
    tracker = ValueTracker(config.algorithm.tracker)
    rollout_phase = RolloutPhase(run, engine, share, tracker)
    loss = PolicyGradient(policy_loss(config.algorithm))
    peak = peak_tflops(world.device, config.log.peak_tflops)
    reference = make_reference(config.algorithm, config.model, engine)

    first_step = book.start(engine, {"tracker": tracker} | rollout_phase.parts)
    rollout_phase.begin(first_step)

    # A new run starts with a validation and with rollouts of every prompt for the tracker.
    if book.is_new:
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

            # Sample one response per prompt (or a group of them) and grade it.
            sampled = rollout_phase.take(step, clock)
            rollouts = sampled.rollouts

            # The tracker's values are read before it sees these rewards. Advantages use the responses of all ranks.
            value = tracker.values(rollouts.keys) if algorithm.tracked else None
            group, success_weight = config.rollout.responses_per_prompt, config.reward.success_weight
            outcomes = share.outcomes(rollouts, value, group, success_weight)
            advantage = share.own(algorithm.advantages(outcomes))

            # Score with the weights from before the updates: how far each prompt's policy has drifted since its last
            # visit, the old log-probs of the policy ratio, and the KL reference.
            if algorithm.tracked:
                drift = drift_of_previous_responses(tracker, engine, rollouts.prompts, clock)
            old_logp = rollouts.logp
            if config.algorithm.old_logp == "recompute":
                with clock("old_logp"):
                    old_logp = engine.score(rollouts)
            ref_logp = None
            if reference is not None:
                with clock("reference"):
                    ref_logp = reference.score(engine, rollouts)
            batch = UpdateBatch(
                rollouts.prompts, rollouts.tokens, rollouts.mask,
                rollouts.loss_mask, rollouts.logp, advantage, old_logp, ref_logp,
            )  # fmt: skip

            # Update. Entropy shaping, clipping and KL term are inside the fused loss. The first gradient pass also yields
            # log-probs under the weights that sampled (one step off: the next ones). If they disagree with the sampler's,
            # the step's gradients would be noise, so no update is made.
            first, *rest = share.updates(batch)
            accumulated = engine.accumulate(first, loss, clock)
            top_p = config.rollout.top_p
            gap = measure_gap(accumulated.logp, first.logp, first.loss_mask, world, top_p=top_p)
            agrees = gap.within(config.rollout.max_gap)
            if agrees:
                updates = [engine.step(accumulated, clock), *(engine.update(part, loss, clock) for part in rest)]
            else:
                updates = [engine.discard(accumulated, clock)]

            # Now the tracker learns the successes, unless the policy did not learn from them.
            metrics = step_metrics(rollouts, updates, gap, clock, world) | sampled.metrics(step, world)
            if agrees:
                metrics |= utilisation(work_of_step(engine.policy, batch, updates), clock, world, peak)
            metrics |= outcome_metrics(outcomes)
            if algorithm.tracked and any(update.applied for update in updates):
                metrics |= track(tracker, share, rollouts, batch, outcomes, drift, updates)
            metrics |= rollout_phase.drop_solved(step + 1)

            # Count costs, validate, record, save a checkpoint.
            done = step + 1
            metrics |= book.count(done, gap, updates, sampled, clock)
            if book.validates(done):
                with rollout_phase.awake(done) as sampler:
                    metrics |= run.validate(sampler)
            baseline = None if outcomes.baseline is None else share.own(outcomes.baseline)
            book.end_step(done, metrics, rollouts, baseline, batch)

    return finish(run, engine.policy)
