"""The guard on the weights' version: a batch sampled from other weights than the step's stops the run."""

from types import SimpleNamespace

import pytest
import torch

from mssr.config import load_config
from mssr.errors import UserError
from mssr.observe.stopwatch import Stopwatch
from mssr.run import Run
from mssr.sampling import StepRollouts, refuse_other_weights
from mssr.shares import Shares


def test_responses_of_the_right_weights_pass():
    refuse_other_weights(SimpleNamespace(weight_version=torch.tensor([4, 4])), step=4, version=4)
    refuse_other_weights(SimpleNamespace(weight_version=torch.tensor([3, 3])), step=4, version=3)


@pytest.mark.parametrize("versions", [[4, 3], [5, 4], [0, 0]])
def test_one_of_others_stops_the_run(versions):
    with pytest.raises(UserError, match=r"^step 5: . responses were sampled from the weights of step \d, not 4"):
        refuse_other_weights(SimpleNamespace(weight_version=torch.tensor(versions)), step=4, version=4)


def test_a_sync_that_does_nothing_stops_the_step(material, monkeypatch):
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }.items():
        monkeypatch.setenv(name, value)
    with Run(load_config(material / "config.yaml")) as run:
        engine = run.policy_engine(run.config.train.optimizer, temperature=1.0, total_updates=1)
        rollouts = StepRollouts(run, engine, Shares(16, 8, run.world))
        clock = Stopwatch(run.world.device)
        assert rollouts.take(0, clock).batch.weight_version.tolist() == [0] * 16
        rollouts._rollout.update_weights = lambda policy, version: None
        with pytest.raises(UserError, match="step 2: 16 responses were sampled from the weights of step 0, not 1"):
            rollouts.take(1, clock)
