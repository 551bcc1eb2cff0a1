"""`mssr sft`: supervised warm start on each row's `solution`, so that RL starts from a policy that is sometimes right.

It saves checkpoints as `train.*` says, and resumes, as `mssr train` does.
"""

from dataclasses import asdict, dataclass, field

import torch

from mssr.batch import Prompt, Sequences
from mssr.config import Config
from mssr.config.schema import SftConfig
from mssr.data.sampler import PromptSampler
from mssr.errors import BadRow
from mssr.observe.progress import SFT_COLUMNS, TrainProgress
from mssr.policy.export import save_trained
from mssr.policy.loss import CrossEntropy
from mssr.stopwatch import Stopwatch
from mssr.training.run import Run
from mssr.training.session import Session
from mssr.training.shares import Shares


def sft(config: Config, *, resume: bool = False) -> dict[str, float]:
    """Train `config.model.path` on `config.sft.data` into `run_dir/model`; return the last validation's metrics.

    resume: continue from the newest checkpoint.

    Raises:
        UserError: a row without a solution; an earlier run in the folder.
        Interrupted: a signal ended the run; the last step is saved.
    """
    with Run(config) as run, Session(run, "sft", resume=resume) as session:
        return _sft(run, session)


@dataclass
class LastValidation:
    """Metrics of the newest validation; part of a checkpoint."""

    metrics: dict[str, float] = field(default_factory=dict)

    def reaches(self, accuracy: float | None) -> bool:
        return self.metrics.get("val/accuracy", 0.0) >= (accuracy or float("inf"))

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, state: dict) -> None:
        self.metrics = state["metrics"]


def _sft(run: Run, session: Session) -> dict[str, float]:
    config, settings, world = run.config, run.config.sft, run.world
    problems = run.dataset(settings.data or config.data.train, needs_answer=False)
    sampler = PromptSampler(len(problems), settings.batch_size, config.seed, problems.parts)
    share = Shares(settings.batch_size, settings.batch_size, world, key="sft.batch_size")
    engine = run.policy_engine(settings.optimizer, temperature=1.0, total_updates=settings.steps)
    rollout = run.rollout_engine(engine.policy)
    validation = LastValidation()
    first_step = session.start(engine, problems, {"validation": validation})
    run.report_data(problems)
    steps = range(first_step, settings.steps)
    if why := _why_ended(settings, first_step, validation):
        session.say_nothing_to_do(first_step, why)
        steps = range(0)

    def own_rows(step: int) -> list[int]:
        rows = sampler.rows(step)
        return [rows[slot] for slot in share.slots]

    progress = TrainProgress(
        f"{config.run_dir} (sft)", settings.steps, first_step, enabled=world.is_main, columns=SFT_COLUMNS
    )
    with session.steps(), progress, run.activity.within(progress):
        for step in steps:
            clock = Stopwatch(world.device)
            prompts = problems.load(own_rows(step))
            problems.begin(own_rows(step + 1))  # in the background
            batch = demonstrations(prompts, run.tokenizer)
            stats = engine.update(batch, CrossEntropy())
            logp, tokens = world.sum(torch.stack([stats.logp.sum().double(), batch.mask.sum().double()])).tolist()
            values = {
                "sft/loss": -logp / tokens,
                "sft/lr": stats.lr,
                "sft/grad_norm": stats.grad_norm,
                "perf/step_seconds": clock.total,
                "perf/tokens_per_second": tokens / clock.total,
            }
            done = step + 1
            if done % settings.eval_every == 0 or done == settings.steps:
                rollout.update_weights(engine.policy, done)
                validation.metrics = run.validate(rollout)
                rollout.release()
                values |= validation.metrics
            run.record(done, values)
            progress.update(done, values)
            last = _why_ended(settings, done, validation) is not None
            session.save_and_end_if_asked(done, due=session.checkpoints.due(done), last=last)
            if last:
                break

    run.activity.say(f"saving {config.run_dir / 'model'}")
    save_trained(engine.policy, run.processors, config.run_dir, world)
    run.draw_curves()
    return validation.metrics


def _why_ended(settings: SftConfig, done: int, validation: LastValidation) -> str | None:
    """Return why no step follows, and how to go on; None if one does."""
    if validation.reaches(settings.stop_at_accuracy):
        return f"sft.stop_at_accuracy {settings.stop_at_accuracy:g} is reached; raise it to train on"
    return f"sft.steps is {settings.steps}; raise it to train on" if done >= settings.steps else None


def demonstrations(prompts: list[Prompt], tokenizer) -> Sequences:
    """Return each row's solution as the response to its prompt, end token included.

    Raises:
        BadRow: a row has no solution.
    """
    for prompt in prompts:
        if not prompt.solution:
            raise BadRow(
                prompt.row, prompt.source, "no `solution` to imitate; add the column, or train with `mssr train` alone"
            )
    encoded = tokenizer([prompt.solution for prompt in prompts], add_special_tokens=False)["input_ids"]
    return Sequences.of(prompts, [torch.tensor([*ids, tokenizer.eos_token_id]) for ids in encoded])
