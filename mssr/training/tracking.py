"""The value tracker in a run: its first rollouts, drift since each prompt's last visit, updates."""

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from mssr.algorithms.advantages import ALGORITHMS, Outcomes
from mssr.algorithms.value_tracker import PreviousResponse, ValueTracker, reference_kl, response_drift
from mssr.batch import GradedRollouts, Prompt, Rollouts, Sequences, UpdateBatch, pad_rows
from mssr.config.algorithm_keys import AlgorithmConfig
from mssr.errors import UserError
from mssr.observe.progress import Advance
from mssr.policy.engine import PolicyEngine, UpdateStats
from mssr.rewards.grading import settle_truncated
from mssr.rollout.base import RolloutEngine, noise_streams
from mssr.stopwatch import Stopwatch
from mssr.training.run import Run
from mssr.training.shares import Shares


def refuse_missing_start(algorithm: AlgorithmConfig, saved: dict[str, Any]) -> None:
    """Refuse to resume with a tracker from a checkpoint without one: only a new run makes the first rollouts.

    saved: the checkpoint's state.

    Raises:
        UserError: there was no tracker, instead of one that saw no grades, and algorithm.tracker.n_init is not 0.
    """
    had_tracker = saved["tracker"]["keys"] or ALGORITHMS[saved["same_run"]["settings"]["algorithm.name"]].tracked
    if ALGORITHMS[algorithm.name].tracked and algorithm.tracker.n_init and not had_tracker:
        raise UserError(
            f"algorithm.name {algorithm.name}: the checkpoint's run had no value tracker; resume with its algorithm.name, "
            "set algorithm.tracker.n_init=0, which starts every prompt at 0.5, or set another run_dir"
        )


def initialise_tracker(tracker: ValueTracker, run: Run, rollout: RolloutEngine) -> tuple[int, int]:
    """Answer every training problem `n_init` times with the initial policy; the successes set each prompt's initial state.

    A response without a grade is left out. The last of the others is the first one whose drift is measured; not with
    rollout.top_p or top_k, since no trainer pass has told their log-probs under the whole distribution.
    Returns the numbers of responses and tokens that this rank generated.
    """
    if not tracker.config.n_init:
        return 0, 0
    with run.activity("first rollouts of the value tracker") as advance:
        seen, responses, tokens = _first_rollouts(tracker, run, rollout, advance)
    # Sorted by visit, so that the result does not depend on the number of ranks.
    everyone = sorted((row for part in run.world.gather(seen) for row in part), key=lambda row: row[0])
    keys = [key for _, key, _, _ in everyone]
    tracker.initialise(keys, torch.tensor([success for _, _, success, _ in everyone]))
    if _remembers_first(tracker, run):
        tracker.remember(keys, [response for *_, response in everyone])
    return responses, tokens


def _first_rollouts(
    tracker: ValueTracker, run: Run, rollout: RolloutEngine, advance: Advance
) -> tuple[list[tuple], int, int]:
    """Return this rank's (visit, key, success, response to remember), and how many responses and tokens it generated."""
    config, world = run.config, run.world
    size, at_once = len(run.problems), config.responses_per_step // world.size  # never 0: updates are shared evenly
    total = size * tracker.config.n_init
    visits = [divmod(visit, size) for visit in range(world.rank, total, world.size)]
    seen, tokens = [], 0
    # Every rank makes the same number of calls: ranks that share a sampler call it together.
    for start in range(0, -(-total // world.size), at_once):
        chosen = visits[start : start + at_once]
        prompts = run.problems.load(row for _, row in chosen)
        streams = [noise_streams(config.seed, "init", visit, [row])[0] for visit, row in chosen]
        grading = run.grader.begin(prompts, lambda: advance(world.size, total))
        answered = rollout.generate(
            prompts,
            streams,
            config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
            on_response=grading,
        )
        graded = grading.finish(answered)
        graded = settle_truncated(graded, config.rollout.truncated)
        kept = previous_responses(graded, graded.logp) if _remembers_first(tracker, run) else [None] * len(graded)
        tokens += int(graded.lengths.sum())
        visited = zip(chosen, graded.keys, graded.correct.tolist(), kept)
        seen += [visit for visit, has_grade in zip(visited, graded.graded.tolist()) if has_grade]
    return seen, len(visits), tokens


def _remembers_first(tracker: ValueTracker, run: Run) -> bool:
    return tracker.wants_responses and not run.config.rollout.cuts_distribution


def drift_of_previous_responses(
    tracker: ValueTracker, engine: PolicyEngine, prompts: Sequence[Prompt], clock: Stopwatch
) -> Tensor:
    """Return the mean |log-prob now - at sampling| over the tokens of each prompt's previous response, [B] float32.

    0 on a prompt's first visit, and for all prompts if the tracker does not use per-prompt drift.
    clock: gets the phase drift.
    """
    drift = torch.zeros(len(prompts))
    if not tracker.wants_responses:
        return drift
    with clock("drift"):
        known = {row: previous for row, prompt in enumerate(prompts) if (previous := tracker.previous(prompt.key))}
        past = Sequences.of([prompts[row] for row in known], [response.token_ids for response in known.values()])
        sampled_logp = pad_rows([response.logp for response in known.values()], past.tokens.shape[1])
        drift[list(known)] = response_drift(engine.score(past), sampled_logp, past.mask)
    return drift


def track(
    tracker: ValueTracker,
    share: Shares,
    rollouts: GradedRollouts,
    batch: UpdateBatch,
    outcomes: Outcomes,
    drift: Tensor,
    updates: list[UpdateStats],
) -> dict[str, float]:
    """Update the tracker with all ranks' successes, in global order, so that every rank's copy stays equal.

    outcomes: of all ranks; responses without a grade are no visits.
    drift: [B_rank] per prompt, measured before the updates.
    updates: of the step; their log-probs give the batch's mean drift (tracker.drift batch).
    Returns metrics.
    """
    if tracker.config.drift == "batch":
        moved = response_drift(torch.cat([update.logp for update in updates]), batch.old_logp, batch.loss_mask)
        applied = torch.cat([torch.full((len(update.logp),), update.applied) for update in updates])
        seen = share.gather(batch.loss_mask.any(1) & applied)
        per_prompt = share.gather(moved)[seen].mean() if seen.any() else torch.zeros(())
    else:
        per_prompt = share.gather(drift)
    if tracker.config.preset == "reference":
        kl = share.gather(reference_kl(batch.old_logp, batch.ref_logp, batch.mask))
        tracker.observe_kl(float(kl.mean()))
    rho = tracker.rho(per_prompt)
    keys, graded = share.gather_list(rollouts.keys), outcomes.graded
    visited = list(compress(keys, graded))
    tracker.update(visited, outcomes.success[graded], rho if rho.dim() == 0 else rho[graded])
    if tracker.wants_responses:
        previous = share.gather_list(previous_responses(rollouts, batch.old_logp))
        tracker.remember(visited, list(compress(previous, graded)))
    return {
        "tracker/value_mean": float(tracker.values(keys).mean()),
        "tracker/rho_mean": float(rho.mean()),
        "tracker/drift_mean": float(per_prompt.mean()),
    }


def previous_responses(rollouts: Rollouts, logp: Tensor) -> list[PreviousResponse]:
    """Return each row's response without padding, copied: a view would keep the whole batch in memory.

    logp: [B, R] under the policy that sampled it. What the trainer recomputed is better than the sampler's, whose top_p,
    top_k and rounding would count as drift.
    """
    lengths = rollouts.lengths.tolist()
    tokens = rollouts.tokens.to(torch.int32)
    return [PreviousResponse(tokens[row, :n].clone(), logp[row, :n].clone()) for row, n in enumerate(lengths)]
