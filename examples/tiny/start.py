"""A tiny model that can already do a little of a task: random weights, then a warm start by `mssr sft`."""

import signal
import subprocess
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from mssr.config import load_config
from mssr.config.data_keys import DataConfig, weights_of
from mssr.data.files import Reading, open_rows
from mssr.errors import Interrupted, UserError
from mssr.guard import Guarded

CORPUS_ROWS = 1000


def warm_start(
    folder: Path,
    config_file: Path,
    overrides: Sequence[str],
    *,
    ranks: int = 1,
    log: Path | None = None,
    **sizes: int,
) -> Path:
    """Write a tiny random model, `folder/untrained`, and train it by `mssr sft`; return `folder/sft/model`.

    overrides: from `warm_start_overrides`. sizes: as `write_tiny_model` takes them.
    log: file for the output of `mssr sft`; None: this process's output.
    """
    from examples.tiny.model import write_tiny_model  # imports for seconds; a mistake in a study's file shows first

    config = load_config(config_file, overrides)
    write_tiny_model(folder / "untrained", corpus(config.data), seed=config.seed, **sizes)
    launch("sft", config_file, overrides, ranks=ranks, log=log)
    return folder / "sft" / "model"


def warm_start_overrides(folder: Path, overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a warm start in `folder`: those given, its model and its run directory."""
    engine = "rollout.engine=hf"  # its few validations take less time than starting vLLM
    return [engine, *overrides, f"model.path={folder / 'untrained'}", f"run_dir={folder / 'sft'}"]


def corpus(config: DataConfig) -> list[str]:
    """Return texts for training the tokenizer: problems and solutions of `data.train`, and the fixed text around them."""
    fixed = ["user\n", "assistant\n", "\n" + config.appended(conversation=False)]
    fixed += [f"system\n{config.system_prompt}"] if config.system_prompt else []
    source = next(iter(weights_of(config.train)))
    texts = []
    for row in islice(open_rows(source, reading=Reading(config.columns_of(source))), CORPUS_ROWS):
        texts += [row["problem"].removeprefix("<image>"), row["solution"], *fixed]
    return texts


def launch(
    command: str, config_file: Path, overrides: Sequence[str], *, ranks: int = 1, log: Path | None = None
) -> None:
    """Run `mssr COMMAND CONFIG KEY=VALUE ...` in its own processes, which end with this one.

    Raises:
        UserError: the command failed.
        Interrupted: a signal ended it.
    """
    launcher = ["-m", "mssr.launch", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    full = [sys.executable, *launcher, "-m", "mssr", command, str(config_file), *overrides]
    if log is None:
        code = Guarded(full).finish()
    else:
        with log.open("w", encoding="utf-8") as file:
            code = Guarded(full, stdout=file, stderr=subprocess.STDOUT).finish()
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise Interrupted(code - 128, "stopped")
    if code:
        raise UserError(f"mssr {command} failed, see {log or 'above'}")
