"""The command line: mssr train | sft | eval | serve | plot | export | push | plan | doctor.

Each command imports heavy libraries only when it runs.
"""

import errno
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TextIO

import mssr.extras  # first: it says in one line which library is missing  # isort: skip
import typer
from typer.core import TyperGroup

import mssr.environment  # noqa: F401  first: torch and transformers read it on import
from mssr.config import load_config
from mssr.config.paths import path_for
from mssr.errors import Diverged, Interrupted, UserError
from mssr.observe.output import outlive_readers


class Commands(TyperGroup):
    """Keeps from click what it would end without a word about the cause: "Aborted." for any EOFError, nothing for EPIPE."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EOFError as error:
            raise RuntimeError(f"unexpected end of a file or stream: {error}") from error
        except BrokenPipeError as error:
            if _reader_is_gone(sys.stdout):  # as in `mssr plot | head`
                raise
            raise RuntimeError(f"a process at the other end of a pipe or socket has ended: {error}") from error
        except KeyboardInterrupt:
            raise Interrupted(signal.SIGINT, "stopped") from None


app = typer.Typer(
    cls=Commands,
    help="Train vision-language models to reason with one rollout per prompt.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

ConfigFile = Annotated[Path, typer.Argument(help="YAML file; see configs/")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="override keys of the YAML file")]
Resume = Annotated[bool, typer.Option(help="continue from the newest checkpoint in run_dir")]


@app.command()
def train(config: ConfigFile, overrides: Overrides = None, resume: Resume = False) -> None:
    """Train by reinforcement learning. On several GPUs: python -m mssr.launch --nproc-per-node N -m mssr train ..."""
    settings = load_config(config, overrides)
    outlive_readers()
    _say(f"mssr: training {settings.model.path}; output in {settings.run_dir}")
    from mssr.training.loop import train

    _say(str(train(settings, resume=resume)))


@app.command()
def sft(config: ConfigFile, overrides: Overrides = None, resume: Resume = False) -> None:
    """Warm start: supervised training on the `solution` of each row; writes run_dir/model."""
    settings = load_config(config, overrides)
    outlive_readers()
    _say(f"mssr: warm start of {settings.model.path}; output in {settings.run_dir}")
    from mssr.training.sft import sft

    validation = sft(settings, resume=resume)
    if "val/accuracy" in validation:
        _say(f"validation accuracy {validation['val/accuracy']:.1%}")
    if _is_main():
        from mssr.training.summary import place_lines, places

        _say("\n".join(place_lines(places(settings.run_dir))))


@app.command("eval")
def evaluate(config: ConfigFile, overrides: Overrides = None) -> None:
    """Measure the accuracy of model.path on data.val."""
    settings = load_config(config, overrides)
    if settings.data.val is None:
        raise UserError(f"{config}: data.val is not set; set it to the problems to evaluate on")
    _say(f"mssr: evaluating {settings.model.path}")
    from mssr.training.run import Run

    with Run(settings) as run:
        policy = run.frozen_policy()
        rollout = run.rollout_engine(policy)
        rollout.update_weights(policy, 0)
        result = run.evaluate(rollout)
    parts = "".join(f", {part} {mean:.3g}" for part, mean in result.parts.items() if part != settings.reward.success)
    _say(
        f"accuracy {result.accuracy:.1%} on {result.problems} problems of {settings.data.val} ("
        f"{f'mean over {result.samples} responses each, ' if result.samples > 1 else ''}"
        f"{result.response_tokens:.1f} tokens per response, {result.truncated:.1%} truncated{parts})"
    )


@app.command()
def serve(
    config: ConfigFile,
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 for trainers on other hosts")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
) -> None:
    """Start a vLLM server for `rollout.engine: servers`: one per GPU, or per tensor-parallel group of GPUs."""
    settings = load_config(config, overrides)
    from mssr.rollout.servers.serve import serve

    serve(settings, host, port)


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="run folders or metrics.jsonl files")],
    out: Annotated[
        Path | None,
        typer.Option(
            parser=path_for("--out"),
            metavar="PNG",
            help="picture to write; default: curves.png in the first run's folder",
        ),
    ] = None,
) -> None:
    """Draw the curves of one run, or compare several runs."""
    from mssr.observe.plots import plot_curves

    files = [run if run.is_file() else run / "metrics.jsonl" for run in runs]
    labels = [str(file.parent) for file in files]
    print(plot_curves(dict(zip(labels, files)), out or files[0].parent / "curves.png"))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="folder of a training run")],
    out: Annotated[
        Path, typer.Option(parser=path_for("--out"), metavar="FOLDER", help="folder to write; must not exist yet")
    ],
    step: Annotated[int | None, typer.Option(help="step of the checkpoint; default: the newest")] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="with model.lora: export only the adapter, for peft")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 or float32; default: as in the run")] = None,
) -> None:
    """Export a checkpoint as a Hugging Face directory."""
    if dtype not in (None, "bfloat16", "float32"):
        raise UserError(f"--dtype {dtype}: choose bfloat16 or float32")
    from mssr.training.export import export

    print(f"step {export(run, out, step=step, adapter=adapter, dtype=dtype)} {out}")


@app.command()
def push(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="folder of a training run")],
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="repository on the Hugging Face hub")],
    step: Annotated[
        int | None, typer.Option(help="upload the checkpoint of this step; default: the trained model")
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="with model.lora: upload only the adapter, for peft")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="make the new repository private")] = False,
    update: Annotated[bool, typer.Option("--update", help="add a commit to a repository that is there")] = False,
) -> None:
    """Upload a run's model and its card to the Hugging Face hub."""
    from mssr.training.push import push

    print(push(run, name, step=step, adapter=adapter, private=private, update=update))


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="a100, h100, h200, rtx4090, ...; an unknown name lists all")] = "h100",
    gpus: Annotated[int, typer.Option(min=1, help="number of ranks, one per GPU")] = 8,
    context: Annotated[
        str | None, typer.Option(help="mean PROMPT,RESPONSE tokens for the step time; default: half of the limits")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Predict GPU memory and step time without loading the model. Exit code 1: the run does not fit."""
    settings = load_config(config, overrides)
    from mssr.planning.plan import plan_run
    from mssr.planning.report import as_json, print_plan

    found = plan_run(settings, gpu, gpus, context)
    print(as_json(found)) if json else print_plan(found)
    raise typer.Exit(found.exit_code)


@app.command()
def doctor(
    integration: Annotated[
        str | None,
        typer.Option(help="compare log-probs, entropy and gradients with transformers, trl, verl, openrlhf or liger"),
    ] = None,
) -> None:
    """Show what is installed, what will be used and what is missing, with the commands that fix it."""
    if integration is not None:
        from mssr.integrations.check import check_integration

        print(check_integration(integration))
        return
    from mssr.doctor import diagnose, print_report

    raise typer.Exit(print_report(diagnose()))


def main() -> None:
    run_command(app)


def run_command(command: Callable[[], None]) -> None:
    """Run a command. A UserError or a full disk is one line on stderr and exit code 2; a diverged run exits with 3."""
    try:
        command()
    except UserError as error:
        print(f"mssr: {error}", file=sys.stderr)
        sys.exit(3 if isinstance(error, Diverged) else 2)
    except (Interrupted, KeyboardInterrupt) as stopped:
        interrupted = stopped if isinstance(stopped, Interrupted) else Interrupted(signal.SIGINT, "stopped")
        if _is_main():  # all ranks say the same
            print(f"mssr: {interrupted}", file=sys.stderr)
        sys.exit(interrupted.exit_code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"mssr: {place}{error.strerror}; checkpoints are intact: make room, and train --resume", file=sys.stderr)
        sys.exit(2)


def _is_main() -> bool:
    """Whether this is rank 0, before the ranks have met."""
    return os.environ.get("RANK", "0") == "0"


def _say(text: str) -> None:
    """Print on rank 0 only."""
    if _is_main():
        print(text, flush=True)


def _reader_is_gone(stream: TextIO) -> bool:
    poll = select.poll()
    poll.register(stream, 0)  # POLLERR is always reported
    return bool(poll.poll(0))


if __name__ == "__main__":
    main()
