"""`mssr sft`: supervised warm start on each row's `solution`, so that RL starts from a policy that is sometimes right."""

import torch

from mssr.batch import Prompt, Sequences
from mssr.config import Config
from mssr.data.sampler import PromptSampler
from mssr.errors import BadRow
from mssr.observe.progress import SFT_COLUMNS, TrainProgress
from mssr.policy.export import save_trained
from mssr.policy.loss import CrossEntropy
from mssr.stopwatch import Stopwatch
from mssr.training.run import Run
from mssr.training.shares import Shares


def sft(config: Config) -> dict[str, float]:
    """Train `config.model.path` on `config.sft.data` into `run_dir/model`; return the last validation's metrics.

    Raises:
        UserError: a row without a solution; an earlier run in the folder.
    """
    with Run(config) as run:
        return _sft(run, config)


def _sft(run: Run, config: Config) -> dict[str, float]:
    settings, world = config.sft, run.world
    run.lock_folder()
    run.refuse_foreign_outputs()
    problems = run.dataset(settings.data) if settings.data else run.problems
    sampler = PromptSampler(len(problems), settings.batch_size, config.seed)
    share = Shares(settings.batch_size, settings.batch_size, world, key="sft.batch_size")
    engine = run.policy_engine(settings.optimizer, temperature=1.0, total_updates=settings.steps)
    rollout = run.rollout_engine(engine.policy)
    run.open_records()

    def own_rows(step: int) -> list[int]:
        rows = sampler.rows(step)
        return [rows[slot] for slot in share.slots]

    validation: dict[str, float] = {}

    progress = TrainProgress(f"{config.run_dir} (sft)", settings.steps, enabled=world.is_main, columns=SFT_COLUMNS)
    with progress, run.activity.within(progress):
        for step in range(settings.steps):
            clock = Stopwatch(world.device)
            prompts = problems.load(own_rows(step))
            problems.begin(own_rows(step + 1))  # in the background
            batch = demonstrations(prompts, run.tokenizer, problems.source)
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
                validation = run.validate(rollout)
                rollout.release()
                values |= validation
            run.record(done, values)
            progress.update(done, values)
            if validation.get("val/accuracy", 0.0) >= (settings.stop_at_accuracy or float("inf")):
                break

    run.activity.say(f"saving {config.run_dir / 'model'}")
    save_trained(engine.policy, run.processors, config.run_dir, world)
    return validation


def demonstrations(prompts: list[Prompt], tokenizer, source: str) -> Sequences:
    """Return each row's solution as the response to its prompt, end token included.

    Raises:
        BadRow: a row has no solution.
    """
    for prompt in prompts:
        if not prompt.solution:
            raise BadRow(
                prompt.row, source, "no `solution` to imitate; add the column, or train with `mssr train` alone"
            )
    encoded = tokenizer([prompt.solution for prompt in prompts], add_special_tokens=False)["input_ids"]
    return Sequences.of(prompts, [torch.tensor([*ids, tokenizer.eos_token_id]) for ids in encoded])
