"""What `mssr train` and `mssr sft` share to survive an interruption: checkpoints, metrics, signals, and resuming."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from typing import Any

from mssr.data.dataset import ProblemDataset
from mssr.data.report import DATA_REPORT
from mssr.errors import Interrupted
from mssr.observe.rollouts import FOLDER as ROLLOUTS
from mssr.observe.rollouts import rollout_folders
from mssr.observe.trackers.trackers import outputs, require_installed
from mssr.policy.engine import PolicyEngine
from mssr.training.checkpoint import FOLDER, Checkpoints
from mssr.training.interruption import Interruptions
from mssr.training.run import Run
from mssr.training.same_run import SameRun
from mssr.training.summary import CARD, SUMMARY


class Session(AbstractContextManager):
    """One process's part of a run, from its start or a checkpoint to its end. Call every method on all ranks.

    saved: the newest checkpoint's state until `start` restores it; None for a new run.
    """

    def __init__(self, run: Run, command: str, *, resume: bool) -> None:
        """command: train or sft.

        Raises:
            UserError: the folder holds a run that is not resumed, or another run, or its checkpoint is damaged.
        """
        self._run, self._resume = run, resume
        self._same = SameRun(command, run.config)
        run.world.on_main(lambda: require_installed(run.config.log.trackers), "log.trackers")
        run.lock_folder()
        with ExitStack() as opened:
            self._interruptions = opened.enter_context(Interruptions(run.world))
            checkpoints = Checkpoints(run.config.run_dir, run.world, run.config.train)
            self.checkpoints = opened.enter_context(closing(checkpoints))
            self.saved = self.checkpoints.newest_state(resume=resume)
            if command == "sft" or self.saved is not None:  # they do not save before a step
                self._interruptions.obeyed = "saves and ends after one step"
            if self.saved is not None:
                self._same.refuse_other_settings(self.saved["same_run"])
                step = self.saved["step"]
                self._interruptions.kept = f"ended before another step; go on from step {step} with --resume"
            others, folders = outputs(run.config.log.trackers)
            others, folders = [*others, *checkpoints.foreign_outputs(), DATA_REPORT], [*folders, FOLDER]
            if command == "train":
                others += rollout_folders(run.config.run_dir, after=self.saved["step"] if self.saved else -1)
                others += [CARD, SUMMARY]
                folders.append(ROLLOUTS)
            run.refuse_foreign_outputs(others, folders)
            self._open = opened.pop_all()

    def start(self, engine: PolicyEngine, problems: ProblemDataset, parts: dict[str, Any]) -> int:
        """Restore the checkpoint, if there is one, and open the metrics. Return the number of steps done.

        problems: the training data.
        parts: everything else to save and restore by name, each with state_dict and load_state_dict.
        """
        self._engine, self._parts, self._data = engine, parts, self._same.trained_on(problems)
        saved, self.saved = self.saved, None  # it holds a copy of the value tracker
        if saved is not None:
            self._same.refuse_other_start(saved["same_run"], self._data)
            self._run.activity.say(f"restoring step {saved['step']}")
            self.checkpoints.load_engine(saved, engine)
            for name, part in parts.items():
                part.load_state_dict(saved[name])
        log = self._run.open_records(
            resume_at=saved["metrics_position"] if saved else 0 if self._resume else None,
            first_step=saved["step"] + 1 if saved else 0,
        )
        if log is not None and self._resume:
            self._say_where_it_goes_on(saved, log.set_aside, log.dropped)
        return saved["step"] if saved else 0

    def _say_where_it_goes_on(self, saved: dict[str, Any] | None, set_aside: Any, dropped: int) -> None:
        if saved is None:
            folder = self._run.config.run_dir / FOLDER
            moved = f"; metrics of the earlier attempt are now in {set_aside}" if set_aside else ""
            print(f"--resume: no checkpoint in {folder}, starts at step 1{moved}", flush=True)
            return
        repeated = f"; {dropped} later lines of metrics.jsonl are dropped, their steps come again" if dropped else ""
        print(f"--resume: goes on after step {saved['step']}{repeated}", flush=True)
        if changes := self._same.changes(saved["same_run"]):
            print(f"--resume: other settings than before: {', '.join(changes)}", flush=True)

    def say_nothing_to_do(self, done: int, why: str) -> None:
        """Say that a resumed run is at its end. why: and how to go on."""
        if self._run.world.is_main:
            print(f"--resume: the run has ended after step {done}: {why}", flush=True)

    @contextmanager
    def steps(self) -> Iterator[None]:
        """Context of the steps, at whose end Ctrl-C is obeyed."""
        with self._interruptions.steps():
            yield
            self._interruptions.kept = "ended; all steps are saved, and --resume writes the model"

    def save_and_end_if_asked(
        self, done: int, *, due: bool = False, best: float | None = None, last: bool = False
    ) -> None:
        """Save a checkpoint if one is due or a signal came. best: accuracy, for a checkpoint to keep as the best.

        Raises:
            Interrupted: a signal ended the run; the step is saved.
        """
        signal = self._interruptions.asked()
        if last or signal:
            self._interruptions.kept = (
                f"ended while step {done} was saved; --resume goes on from the last whole checkpoint"
            )
        if due or last or signal:
            state = {name: part.state_dict() for name, part in self._parts.items()}
            state |= {"same_run": self._same.state_dict(self._data), "metrics_position": self._run.metrics_position}
            self.checkpoints.save(done, self._engine, state, best=best)
        self.checkpoints.settle(wait=last or signal > 0)
        if last or signal:
            self._interruptions.kept = f"ended; step {done} is saved, go on with --resume"
        if signal:
            raise Interrupted(signal, f"saved step {done}; go on with --resume")

    def __exit__(self, *error) -> None:
        self._open.__exit__(*error)
