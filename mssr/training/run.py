"""Set-up that all commands share: processes, data, policy, sampler, reward, metrics."""

import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mssr.batch import GradedRollouts
from mssr.config import Config, load_config, yaml_1_2
from mssr.config.data_keys import Files, written
from mssr.config.resolve import dtype_name, engine_name
from mssr.config.schema import OptimizerConfig
from mssr.data.dataset import ProblemDataset
from mssr.data.processors import processors_to_save
from mssr.data.prompts import PromptEncoder, load_processors
from mssr.data.report import write_data_report
from mssr.data.solved import Solved
from mssr.distributed import World, require_device, start_world
from mssr.errors import UserError, shortened
from mssr.evaluation.evaluate import Evaluation, evaluate
from mssr.folder_lock import locked
from mssr.observe.metrics import FILE_NAME, Metric, MetricsLog
from mssr.observe.picture import refuse_other_file
from mssr.observe.progress import Activity
from mssr.observe.rollouts import save_rollouts
from mssr.observe.trackers.trackers import Trackers
from mssr.outputs import ANYTHING, clear_leftovers, note, refuse_foreign, replace
from mssr.policy.engine import PolicyEngine
from mssr.policy.loading import check_model_path, load_frozen_policy
from mssr.policy.model import Policy
from mssr.rewards.grading import LOG, Grader, start_pools
from mssr.rollout import make_rollout_engine
from mssr.rollout.base import RolloutEngine
from mssr.training.same_run import flat_settings

CONFIG, CURVES = "config.yaml", "curves.png"


class Run(AbstractContextManager):
    """The parts of a run that are not the algorithm. Data and model load on first use; a bad path fails at once.

    config: as given; with a Python function as the reward, `reward.function` says which.
    """

    def __init__(self, config: Config, reward: Callable | None = None) -> None:
        """reward: a Python function in the place of `reward.function`; the workers get a copy of it.

        Raises:
            UserError: no such model, device or reward function.
        """
        require_device(config.device)  # what needs no network is said first
        check_model_path(config.model.path)
        self.config = config if reward is None else with_own_reward(config, reward)
        self.world: World = start_world(config.device)
        self.activity = Activity(self.world.is_main)
        self._metrics: MetricsLog | None = None
        self._trackers: Trackers | None = None
        self._open = ExitStack()
        try:
            self._start(reward)
        except BaseException:
            self._open.close()
            raise

    def _start(self, reward: Callable | None) -> None:
        config, log = self.config, self.config.run_dir / LOG
        with self.world.together():
            pools = start_pools(config.reward, reward, log)
        for pool in pools.values():
            self._open.callback(pool.close)
        if config.rollout.engine == "servers":
            self._look_for_servers()
        self.tokenizer, image_processor = load_processors(config.model.path)
        self._encoder = PromptEncoder(
            self.tokenizer, image_processor, config.data, needs_answer=config.reward.needs_answer
        )
        self.processors = processors_to_save(config.model.path, self.tokenizer, self._encoder.image_processor)
        max_tokens = config.rollout.max_response_tokens
        self.grader = Grader(pools, config.reward, self.tokenizer, max_tokens=max_tokens, world=self.world, log=log)
        self._open.callback(self.grader.close)

    @cached_property
    def problems(self) -> ProblemDataset:
        return self.dataset(self.config.data.train)

    @cached_property
    def held_out(self) -> ProblemDataset | None:
        return None if self.config.data.val is None else self.dataset(self.config.data.val)

    def dataset(self, sources: Files, *, needs_answer: bool = True) -> ProblemDataset:
        """Open a dataset until the end of the run. Collective: the ranks check its rows together."""
        encoder = self._encoder if needs_answer else self._encoder.without_answers()
        with self.activity(f"checking the rows of {written(sources)}") as advance:
            problems = ProblemDataset(sources, encoder, self.config.data, self.world, advance)
        self._open.callback(problems.close)
        return problems

    def report_data(self, trained: ProblemDataset, solved: Mapping[int, Solved] | None = None) -> None:
        """Write data_report.json. Collective; after `lock_folder`.

        trained: the training data. solved: what `data.drop_solved` leaves out of it.
        """
        datasets = {"train": trained, "val": self.held_out}
        run_dir = self.config.run_dir
        self.world.on_main(
            lambda: write_data_report(run_dir, datasets, solved), f"run_dir {run_dir}: cannot be written"
        )

    def policy_engine(self, optimizer: OptimizerConfig, *, temperature: float, total_updates: int) -> PolicyEngine:
        model, train = self.config.model, self.config.train
        self._say_loading()
        return PolicyEngine(model, optimizer, train, self.world, temperature=temperature, total_updates=total_updates)

    def frozen_policy(self) -> Policy:
        """Load the model for inference only (`mssr eval`)."""
        dtype = getattr(torch, dtype_name(self.config.model.dtype, self.world.device.type))
        self._say_loading()
        return load_frozen_policy(self.config.model.path, dtype, self.world.device, self.config.model)

    def rollout_engine(self, policy: Policy) -> RolloutEngine:
        """Start the rollout engine; it is closed with the run."""
        if engine_name(self.config.rollout.engine, self.world.device.type) == "vllm":
            self.activity.say("starting vLLM")
        engine = make_rollout_engine(self.config, policy, self.tokenizer, self.world)
        self._open.callback(engine.close)
        return engine

    def evaluate(self, rollout: RolloutEngine) -> Evaluation:
        """Answer every held-out problem (or the first eval.max_problems) eval.samples times."""
        problems, config = self.held_out, self.config
        with self.activity(f"validation on {config.data.val}") as advance:
            return evaluate(problems, rollout, self.grader, self.world, config.eval, seed=config.seed, advance=advance)

    def validate(self, rollout: RolloutEngine) -> dict[str, float]:
        """Return metrics on the held-out problems; empty if there are none.

        val/accuracy is missing if no response has a grade. val/reward_timeouts, val/reward_errors, only if there are any:
        calls of the reward functions that were late or failed.
        """
        if self.held_out is None:
            return {}
        before = self.grader.cost
        result = self.evaluate(rollout)
        after = self.grader.cost
        failed = torch.tensor([after.timeouts - before.timeouts, after.errors - before.errors])
        failures = zip(("val/reward_timeouts", "val/reward_errors"), self.world.sum(failed).tolist())
        return {
            **({} if math.isnan(result.accuracy) else {"val/accuracy": result.accuracy}),
            "val/response_tokens": result.response_tokens,
            "val/truncated": result.truncated,
            **{f"val/reward_{part}": mean for part, mean in result.parts.items()},
            **{key: float(count) for key, count in failures if count},
        }

    def lock_folder(self) -> None:
        """Keep other processes out of run_dir until the end of the run. Collective.

        Raises:
            UserError: another process uses run_dir, or it cannot be written.
        """
        run_dir = self.config.run_dir

        def lock() -> None:
            try:
                self._open.enter_context(locked(run_dir))
                clear_leftovers(run_dir)
            except FileExistsError:
                raise UserError(
                    f"run_dir {run_dir}: a file, or a symlink to nothing, is there; name a folder"
                ) from None

        self.world.on_main(lock, f"run_dir {run_dir}: cannot be written")

    def refuse_foreign_outputs(self, others: Iterable[str] = (), folders: Iterable[str] = ()) -> None:
        """Refuse to start if this run would replace something that it did not write. Collective; after `lock_folder`.

        others: outputs besides config, curves, model and adapter, by their names in run_dir.
        folders: names of folders that the run writes into, and may find there.

        Raises:
            UserError: something is there that is not this run's.
        """
        config, run_dir = self.config, self.config.run_dir
        written = ["model", "adapter"] if config.model.lora else ["model"]

        def refuse() -> None:
            if Path(config.model.path).exists():
                start = Path(config.model.path).resolve()
                if any(start.is_relative_to((run_dir / name).resolve()) for name in written):
                    raise UserError(f"model.path {start}: this run would replace it by its result; set another run_dir")
            for path in (run_dir / name for name in folders):
                if os.path.lexists(path) and not path.is_dir():
                    raise UserError(
                        f"{path}: no folder, and this run needs one there; move it away, or set another run_dir"
                    )
            refuse_other_file(run_dir / CURVES, "move it away, or set another run_dir")
            refuse_foreign(run_dir, [*written, LOG, *others, *([] if self._config_is_there() else [CONFIG])])

        self.world.on_main(refuse, f"run_dir {run_dir}: cannot be read")

    def _config_is_there(self) -> bool:
        """Return whether run_dir has a config.yaml that says the same, perhaps a person's own."""
        try:
            return load_config(self.config.run_dir / CONFIG) == self.config
        except UserError:
            return False

    def open_records(self, *, resume_at: int | None = None, first_step: int = 0) -> MetricsLog | None:
        """Start (or continue) metrics.jsonl and the trackers, and write the configuration. Collective.

        Return the log on rank 0.
        resume_at: of MetricsLog. first_step: of the metrics that come; 0: a new run.

        Raises:
            UserError: the folder holds an earlier run's metrics, or cannot be written; a tracker cannot be started.
        """
        run_dir = self.config.run_dir

        def open_them() -> MetricsLog:
            log = MetricsLog(run_dir, resume_at=resume_at)
            self._open.callback(log.close)
            if not (run_dir / LOG).exists():
                note(run_dir, LOG, ANYTHING)
                (run_dir / LOG).touch()
            if not self._config_is_there():
                text = yaml_1_2.dump(self.config.model_dump(mode="json"), sort_keys=False)
                replace(run_dir, CONFIG, lambda partial: partial.write_text(text))
            trackers = Trackers(run_dir, self.config.log, flat_settings(self.config), first_step)
            self._trackers = self._open.enter_context(trackers)
            return log

        self._metrics = self.world.on_main(open_them, f"run_dir {run_dir}: cannot be written")
        return self._metrics

    def record(self, step: int, values: dict[str, Metric]) -> None:
        """Write a line of metrics. Collective.

        Raises:
            UserError: it cannot be written.
        """
        with self.world.together():
            if self._metrics is not None:
                self._metrics.write(step, values)
                self._trackers.scalars(step, values)

    def save_rollouts(self, step: int, rollouts: GradedRollouts, baseline: Tensor | None, advantage: Tensor) -> None:
        """Save the first `log.rollouts_saved` rollouts of a step, and show them in the trackers. Collective.

        baseline, advantage: [B] of the rows.

        Raises:
            UserError: they cannot be written.
        """
        run_dir, count = self.config.run_dir, self.config.log.rollouts_saved

        def save() -> None:
            folder = save_rollouts(run_dir, step, rollouts, baseline, advantage, count)
            self._trackers.rollouts(step, folder)

        failure = f"{run_dir}: rollouts of step {step} cannot be written"
        self.world.on_main(save, failure, remedy="make room and train with --resume")

    def draw_curves(self) -> bool:
        """Draw curves.png and show it in the trackers; return whether it is there, on rank 0. Collective.

        A picture that cannot be drawn or shown costs a line on stderr, not the model.
        """
        run_dir = self.config.run_dir

        def draw() -> bool:
            try:
                from mssr.observe.plots import plot_curves  # half a second of imports

                self._trackers.curves(plot_curves({run_dir.resolve().name: run_dir / FILE_NAME}, run_dir / CURVES))
            except Exception as error:
                print(f"mssr: {CURVES} was not drawn: {shortened(error, 200)}", file=sys.stderr, flush=True)
                return False
            return True

        return bool(self.world.on_main(draw, f"{run_dir}: cannot be written"))

    @property
    def tracker_places(self) -> dict[str, str]:
        """Where to look at the run in each tracker, on rank 0."""
        return {} if self._trackers is None else self._trackers.places

    @property
    def metrics_position(self) -> int:
        """Length of metrics.jsonl, on rank 0. Collective.

        Raises:
            UserError: it cannot be written.
        """
        with self.world.together():
            return self._metrics.position if self._metrics is not None else 0

    def _say_loading(self) -> None:
        path = self.config.model.path
        self.activity.say(
            f"loading {path}" if Path(path).exists() else f"loading {path}, from the hub unless it is cached"
        )

    def _look_for_servers(self) -> None:
        """Refuse servers that cannot be reached, before the model loads, and say which ones do not answer yet."""
        from mssr.rollout.servers.client import not_listening

        for server, reason in not_listening(self.config.rollout.servers).items():
            self.activity.say(f"rollout.servers {server} is not there yet ({reason}); start it with `mssr serve`")

    def __exit__(self, *error) -> None:
        self._open.__exit__(*error)


def with_own_reward(config: Config, function: Callable) -> Config:
    """Return the configuration with the name of a Python function as `reward.function`.

    Raises:
        UserError: the configuration names another function.
    """
    named = function if hasattr(function, "__qualname__") else type(function)  # an object that can be called
    reference, given = f"{named.__module__}:{named.__qualname__}", config.reward.function
    if given not in (type(config.reward).model_fields["function"].default, reference):
        raise UserError(
            f"reward.function is {given!r}, and a Python function {named.__name__} is given too; leave one of them out"
        )
    return config.model_copy(update={"reward": config.reward.model_copy(update={"function": reference})})
