"""What one Python process does with `mssr.train`; test_python_interface.py looks at the result.

python -m tests.training.python_session CONFIG FOLDER MODE
"""

import gc
import json
import os
import signal
import sys
import threading
from pathlib import Path

from mssr import load_config, train
from mssr.policy.model import Policy

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def surroundings() -> dict:
    handlers = {name: str(signal.getsignal(getattr(signal, name))) for name in ("SIGINT", "SIGTERM", "SIGUSR1")}
    threads = sorted(thread.name for thread in threading.enumerate())
    return handlers | {name: os.environ.get(name) for name in LAUNCHED} | {"threads": threads}


def twice(config: str, folder: Path) -> dict:
    seen, before = [], surroundings()
    first = train(
        load_config(config, [f"run_dir={folder / 'first'}"]), on_step=lambda step, metrics: seen.append((step, metrics))
    )
    after = surroundings()
    gc.collect()
    left = sum(isinstance(thing, Policy) for thing in gc.get_objects())
    again = threading.Thread(target=lambda: train(load_config(config, [f"run_dir={folder / 'second'}"])))
    again.start()
    again.join()
    return {
        "seen": seen,
        "before": before,
        "after": after,
        "returned": str(first),
        "steps": first.steps,
        "left": left,
    }


def stopped(config: str, folder: Path) -> dict:
    summary = train(load_config(config, [f"run_dir={folder}"]), on_step=lambda step, _: step < 3)
    return {"steps": summary.steps}


def failing(config: str, folder: Path) -> None:
    def on_step(step, metrics):
        if step == 3:
            raise KeyError("no such metric")

    train(load_config(config, [f"run_dir={folder}"]), on_step=on_step)


def in_the_way(config: str, folder: Path) -> None:
    """A person's picture appears where the curves would go."""
    train(
        load_config(config, [f"run_dir={folder}", "train.steps=1"]),
        on_step=lambda *_: (folder / "curves.png").write_text("mine"),
    )


if __name__ == "__main__":
    config, folder, mode = sys.argv[1:]
    print("\n" + json.dumps(globals()[mode](config, Path(folder))))
