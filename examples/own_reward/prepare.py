"""Make what `mssr train examples/own_reward/config.yaml` starts from: the data, and a tiny model after a warm start."""

import argparse
from pathlib import Path

import mssr.extras  # noqa: F401  first: it says in one line which library is missing  # isort: skip

from examples.own_reward.shapes import write_shapes
from examples.tiny.start import warm_start, warm_start_overrides
from mssr.cli import run_command  # also sets environment variables for the commands
from mssr.config.paths import path_for

CONFIG = Path(__file__).parent / "config.yaml"


def prepare(folder: Path, seed: int = 0) -> Path:
    """Write the data and the model to `folder`; return the model's folder.

    Raises:
        UserError: the folder holds files, or the warm start failed.
    """
    write_shapes(folder, seed=seed)
    data = [f"seed={seed}", f"data.train={folder / 'train.jsonl'}", f"data.val={folder / 'val.jsonl'}"]
    return warm_start(folder, CONFIG, warm_start_overrides(folder, data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=path_for("folder"), nargs="?", default=Path("runs/shapes"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    prepare(arguments.folder, arguments.seed)


if __name__ == "__main__":
    run_command(main)
