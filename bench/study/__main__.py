"""`python -m bench.study run | report`: compare algorithms or settings at equal cost, arms x seeds."""

from pathlib import Path
from typing import Annotated

import typer

import mssr.environment  # noqa: F401  first: torch and transformers read it when they load
from mssr.cli import run_command

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


@app.command()
def run(
    study: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="arms x seeds; see bench/study/configs/")],
    jobs: Annotated[int | None, typer.Option(min=1, help="runs in parallel; default: `jobs` of the file")] = None,
) -> None:
    """Run what is not finished, then write table and plots."""
    from bench.study.study import study as run_study

    table = run_study(study, jobs)
    written = sorted(path.name for path in table.parent.iterdir() if path.suffix in (".md", ".png"))
    print(f"{table.read_text()}\n{table.parent}: {', '.join(written)}")


@app.command()
def report(
    studies: Annotated[list[Path], typer.Argument(metavar="STUDY...", help="folders of studies, or results.json")],
    out: Annotated[Path, typer.Option(help="Markdown page to write; its figures go to a folder next to it")],
) -> None:
    """Write a page of studies: tables, figures, and a verdict on each claim."""
    from bench.study.report import write_report

    print(write_report(studies, out))


def main() -> None:
    run_command(app)


if __name__ == "__main__":
    main()
