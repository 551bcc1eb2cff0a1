"""The training loop: one step of the method (arXiv 2512.18215), top to bottom.

    weights to the sampler -> prompts -> one rollout each -> rewards -> baseline -> advantages -> updates -> value tracker

One response a prompt: no groups, no critic, no replay. What other rollouts of a prompt would tell, the tracker remembers.
The algorithms that MSSR is compared with run in the same loop: those with groups sample several responses a prompt and have
no tracker.
"""

from contextlib import closing, nullcontext
from dataclasses import replace

from mssr.algorithms.advantages import ALGORITHMS
from mssr.algorithms.value_tracker import ValueTracker
from mssr.config import Config
from mssr.config.resolve import policy_loss
from mssr.errors import Interrupted
from mssr.observe.progress import TrainProgress
from mssr.observe.rollouts import save_rollouts
from mssr.observe.step import outcome_metrics, step_metrics
from mssr.observe.utilisation import peak_tflops, utilisation, work_of_step
from mssr.policy.export import save_model
from mssr.policy.reference import make_reference
from mssr.rollout.gap import GapCheck
from mssr.stopwatch import Stopwatch
from mssr.training.checkpoint import Checkpoints
from mssr.training.costs import Costs
from mssr.training.interruption import Interruptions
from mssr.training.rollout_phase import StepRollouts
from mssr.training.run import Run
from mssr.training.shares import Shares
from mssr.training.skipping import SkippedSteps
from mssr.training.tracking import drift_of_previous_responses, initialise_tracker, refuse_missing_start, track


def train(config: Config, *, resume: bool = False) -> None:
    """Trains `config.model.path` by RL; everything it leaves is in `config.run_dir`.

    resume: go on from the newest checkpoint. On a CPU the resumed run equals an uninterrupted one exactly.

    Raises:
        UserError: the run cannot start (model, data, an earlier run in the folder) or go on (disk, log-prob gap).
        Interrupted: it was asked to end by a signal, and has saved.
    """
    with (
        Run(config) as run,
        Interruptions(run.world) as interruptions,
        closing(Checkpoints(config.run_dir, run.world, config.train)) as checkpoints,
    ):
        _train(run, checkpoints, interruptions, resume)


def _train(run: Run, checkpoints: Checkpoints, interruptions: Interruptions, resume: bool) -> None:
    config, world = run.config, run.world
    saved = checkpoints.newest_state(resume=resume)

    share = Shares(config.responses_per_step, config.train.responses_per_update, world)
    engine = run.policy_engine(
        config.train.optimizer,
        temperature=config.rollout.temperature,
        total_updates=config.total_updates,
    )
    algorithm = ALGORITHMS[config.algorithm.name]
    tracker = ValueTracker(config.algorithm.tracker)
    rollouts = StepRollouts(run, engine, share, tracker)
    loss_config = policy_loss(config.algorithm)
    recompute = config.algorithm.old_logp == "recompute"
    peak = peak_tflops(world.device, config.log.peak_tflops)
    reference = make_reference(config.algorithm, config.model, engine)
    skipped = SkippedSteps(config.train.max_skipped_steps, config.rollout.max_gap)
    costs = Costs()
    remembering = {"tracker": tracker, "lengths": rollouts.lengths, "skipped": skipped, "costs": costs}

    if saved:
        run.refuse_other_data(saved)
        refuse_missing_start(config.algorithm, saved["tracker"])
        checkpoints.load_engine(saved, engine)
        for name, part in remembering.items():
            part.load_state_dict(saved[name])
    first_step = saved["step"] if saved else 0
    run.open_records(resume_at=saved["metrics_position"] if saved else 0 if resume else None)
    rollouts.prepare(first_step)

    def save_and_end_if_asked(done: int, *, due: bool = False, best: float | None = None, last: bool = False) -> None:
        signal = interruptions.asked()
        if due or signal:
            state = {name: part.state_dict() for name, part in remembering.items()} | run.state_dict()
            checkpoints.save(done, engine, state, best=best)
        checkpoints.settle(wait=last or signal > 0)
        if signal:
            raise Interrupted(signal, f"saved step {done}; go on with --resume")

    if not saved:
        with rollouts.awake(0) as rollout:
            values = run.validate(rollout)
            if algorithm.tracked:
                clock = Stopwatch(world.device)
                generated, tokens = initialise_tracker(tracker, run, rollout)
                costs.spend(world, updates=0, rollouts=generated, tokens=tokens, seconds=clock.total)
            run.record(0, values | costs.metrics())
        costs.refuse_no_step(config.train.budget)
        save_and_end_if_asked(0)
    del saved  # the tracker has it now

    with TrainProgress(str(config.run_dir), config.train.steps, first_step, enabled=world.is_main) as progress:
        for step in range(first_step, config.train.steps):
            if costs.reach(config.train.budget):
                break
            clock = Stopwatch(world.device)

            # One response a prompt (or a group of them), and its reward.
            sampled = rollouts.take(step, clock)
            batch = sampled.batch

            # The baseline is read before the tracker sees these rewards; A is normalised over the whole batch.
            batch = replace(batch, baseline=tracker.values(batch.keys) if algorithm.tracked else None)
            outcomes = share.outcomes(batch, config.rollout.responses_per_prompt)
            batch = replace(batch, advantage=share.own(algorithm.advantages(outcomes)))

            if algorithm.tracked:
                with clock("drift") if tracker.wants_responses else nullcontext():
                    drift = drift_of_previous_responses(tracker, engine, batch.prompts)
            with clock("old_logp") if recompute else nullcontext():
                batch = replace(batch, old_logp=engine.score(batch) if recompute else batch.logp)
            if reference is not None:
                with clock("reference"):
                    batch = replace(batch, ref_logp=reference.score(engine, batch))

            # Entropy shaping, clipping and the KL term are inside the fused loss. The first update's log-probs are from the
            # weights that sampled (one step off: from the next ones); if they are not the sampler's, no update is made.
            first, *rest = share.updates(batch)
            check = GapCheck(first, config.rollout.max_gap, world)
            updates = [engine.update(first, loss_config, accept=check, clock=clock)]
            if check.passed:
                updates += [engine.update(part, loss_config, clock=clock) for part in rest]

            done = step + 1
            left_out = skipped.observe(check, updates)
            values = step_metrics(batch, updates, check.gap, clock, world) | sampled.metrics(step) | skipped.metrics()
            if check.passed:
                values |= utilisation(work_of_step(engine.policy, config.model, batch, updates), clock, world, peak)
            values |= outcome_metrics(outcomes)
            if algorithm.tracked and any(update.applied for update in updates):
                values |= track(tracker, share, batch, outcomes.reward, drift, updates)
            spent = {"rollouts": sampled.rollouts, "tokens": sampled.tokens, "seconds": clock.total}
            costs.spend(world, updates=len(updates), **spent)
            values |= costs.metrics()
            if left_out:
                progress.note(f"step {done}: {left_out}")

            last = done == config.train.steps or costs.reach(config.train.budget)
            if done % config.eval.every == 0 or last:
                with rollouts.awake(done) as rollout:
                    values |= run.validate(rollout)
            run.record(done, values)
            progress.update(done, values)
            if left_out:
                checkpoints.settle(wait=True)
                skipped.refuse_to_go_on(done, check, left_out)
            if done % config.log.rollouts_every == 0 and world.is_main:
                save_rollouts(config.run_dir, done, batch, sampled.texts, config.log.rollouts_saved)

            accuracy = values.get("val/accuracy")
            best = (
                accuracy if config.train.keep_best and accuracy is not None and checkpoints.is_best(accuracy) else None
            )
            due = checkpoints.due(done) or best is not None or last
            save_and_end_if_asked(done, due=due, best=best, last=last)

    save_model(engine.policy, run.processors, config.run_dir / "model", world)
