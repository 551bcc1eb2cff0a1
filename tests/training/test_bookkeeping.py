"""The bookkeeping of a run."""

import signal

import pytest

from mssr.config import load_config
from mssr.errors import UserError
from mssr.training.bookkeeping import Bookkeeping
from mssr.training.run import Run


def test_a_run_that_may_not_start_leaves_the_signals_alone(material, single_process, tmp_path):
    (tmp_path / "checkpoints" / "step_000003").mkdir(parents=True)
    before = signal.getsignal(signal.SIGTERM)
    with (
        Run(load_config(material / "config.yaml", [f"run_dir={tmp_path}"])) as run,
        pytest.raises(UserError, match="continue with --resume"),
    ):
        Bookkeeping(run, resume=False)
    assert signal.getsignal(signal.SIGTERM) is before
