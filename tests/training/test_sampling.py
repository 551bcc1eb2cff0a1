"""The guard on the weights' version: a batch sampled from other weights than the step's stops the run."""

from types import SimpleNamespace

import pytest
import torch

from mssr.errors import UserError
from mssr.sampling import refuse_other_weights


def test_responses_of_the_right_weights_pass():
    refuse_other_weights(SimpleNamespace(weight_version=torch.tensor([4, 4])), step=4, version=4)
    refuse_other_weights(SimpleNamespace(weight_version=torch.tensor([3, 3])), step=4, version=3)


@pytest.mark.parametrize("versions", [[4, 3], [5, 4], [0, 0]])
def test_one_of_others_stops_the_run(versions):
    with pytest.raises(UserError, match=r"^step 5: . responses were sampled from the weights of step \d, not 4"):
        refuse_other_weights(SimpleNamespace(weight_version=torch.tensor(versions)), step=4, version=4)
