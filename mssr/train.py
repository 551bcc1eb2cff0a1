"""The training loop: METHOD "One step", top to bottom.

    weights to the sampler -> prompts -> one rollout each -> rewards -> baseline -> advantages -> updates -> value tracker

One response a prompt: no groups, no critic, no replay. What other rollouts of a prompt would tell, the tracker remembers.
"""

from dataclasses import replace

from mssr.algorithms import make_algorithm
from mssr.algorithms.value_tracker import ValueTracker
from mssr.checkpoint import Checkpoints
from mssr.config import Config
from mssr.errors import UserError
from mssr.observe.progress import TrainProgress
from mssr.observe.rollouts import save_rollouts
from mssr.observe.step import step_metrics
from mssr.observe.stopwatch import Stopwatch
from mssr.policy.export import save_model
from mssr.rollout.gap import measure_gap, refuse_large_gap
from mssr.run import Run
from mssr.sampling import StepRollouts
from mssr.shares import Shares
from mssr.tracking import drift_of_previous_responses, initialise_tracker, track


def train(config: Config, *, resume: bool = False) -> None:
    """Trains `config.model.path` by single-rollout RL; everything it leaves is in `config.run_dir`.

    resume: go on from the newest checkpoint. On a CPU the resumed run equals an uninterrupted one exactly.

    Raises:
        UserError: the run cannot start (model, data, an earlier run in the folder) or go on (disk, log-prob gap).
    """
    with Run(config) as run:
        _train(run, resume)


def _train(run: Run, resume: bool) -> None:
    config, world = run.config, run.world
    checkpoints = Checkpoints(config.run_dir, world, config.train.keep_checkpoints)
    saved = checkpoints.newest_state(resume=resume)

    share = Shares(config.rollout.prompts_per_step, config.train.responses_per_update, world)
    engine = run.policy_engine(
        config.train.optimizer,
        temperature=config.rollout.temperature,
        total_updates=config.train.steps * config.updates_per_step,
    )
    rollouts = StepRollouts(run, engine, share)
    algorithm = make_algorithm(config.algorithm)
    loss_config = algorithm.loss_config()
    reference = run.frozen_policy() if loss_config.kl_coef else None
    tracker = ValueTracker(config.algorithm.tracker)

    if saved:
        run.refuse_other_data(saved)
        checkpoints.load_engine(saved["step"], engine)
        tracker.load_state_dict(saved["tracker"])
        rollouts.lengths.load_state_dict(saved.get("lengths", {}))
    run.open_records(resume_at=saved["metrics_position"] if saved else 0 if resume else None)
    if not saved:
        with rollouts.awake(0) as rollout:
            run.record(0, run.validate(rollout))
            initialise_tracker(tracker, run, rollout)

    first_step = saved["step"] if saved else 0
    with TrainProgress(str(config.run_dir), config.train.steps, first_step, enabled=world.is_main) as progress:
        for step in range(first_step, config.train.steps):
            clock = Stopwatch(world.device)

            # One response a prompt, and its reward.
            sampled = rollouts.take(step, clock)
            batch = sampled.batch

            # The baseline is read before the tracker sees these rewards; A is normalised over the whole batch.
            batch = replace(batch, baseline=tracker.values(batch.keys))
            reward, baseline = share.gather(batch.reward), share.gather(batch.baseline)
            batch = replace(batch, advantage=share.own(algorithm.advantages(reward, baseline)))

            with clock("score"):
                drift = drift_of_previous_responses(tracker, engine, batch.prompts)
                recompute = config.algorithm.old_logp == "recompute"
                batch = replace(batch, old_logp=engine.score(batch) if recompute else batch.logp)
                if reference is not None:
                    batch = replace(batch, ref_logp=engine.score(batch, reference))

            with clock("update"):  # entropy shaping, clipping and the KL term are inside the fused loss
                parts = share.updates(batch)
                updates = [engine.update(part, loss_config) for part in parts]

            # The first update's log-probs are from the weights that sampled (one step off: from the next ones).
            gap = measure_gap(updates[0].logp, parts[0].logp, parts[0].loss_mask, world)
            values = step_metrics(batch, updates, gap, clock, world) | sampled.metrics(step)
            done = step + 1
            try:
                refuse_large_gap(gap, config.rollout.max_gap, done)
                values |= track(tracker, share, batch, reward, drift, updates)
            except UserError:
                run.record(done, values)  # what the step saw before it was refused
                raise

            if done % config.eval.every == 0 or done == config.train.steps:
                with rollouts.awake(done) as rollout:
                    values |= run.validate(rollout)
            run.record(done, values)
            progress.update(done, values)
            if done % config.log.rollouts_every == 0 and world.is_main:
                save_rollouts(config.run_dir, done, batch, sampled.texts, config.log.rollouts_saved)
            if done % config.train.checkpoint_every == 0 or done == config.train.steps:
                state = {"tracker": tracker.state_dict(), "lengths": rollouts.lengths.state_dict(), **run.state_dict()}
                checkpoints.save(done, engine, state)

    save_model(engine.policy, run.processors, config.run_dir / "model", world)
