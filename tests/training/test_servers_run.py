"""`mssr train` with a real vLLM server: synchronous, and with one_step_off."""

import sys
from pathlib import Path

import pytest
from run_folder import RunFolder

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("policy", "rollout")]

from server_helpers import Server  # noqa: E402

pytestmark = pytest.mark.slow(
    "47 s: a vLLM server of its own; test_servers has the engine, test_algorithms_run the loop"
)
STEPS = 5
ONE_STEP_OFF = ["rollout.one_step_off=true", "rollout.max_gap=9"]  # with this lr the policy moves far per step


@pytest.fixture(scope="module")
def server(warm, tmp_path_factory):
    with Server(tmp_path_factory.mktemp("server"), config=warm) as server:
        yield server.wait()


def trained(mssr, warm, server, folder, *overrides):
    run = RunFolder(folder)
    run.settings = [
        run.override, "rollout.engine=servers", f"rollout.servers=[{server.url}]", f"train.steps={STEPS}",
        "algorithm.old_logp=recompute", "train.zero_stage=2", *overrides,
    ]  # fmt: skip
    run.ended = mssr("train", warm, *run.settings).check()
    return run


def test_in_turn_every_response_is_from_the_steps_own_weights(mssr, warm, server, tmp_path):
    run = trained(mssr, warm, server, tmp_path / "run", "rollout.max_gap=1e-3")
    for line in run.metrics[1:]:
        assert line["rollout/staleness"] == 0 and line["rollout/logp_gap_max"] < 1e-4
        assert line["policy/tis_weight"] == pytest.approx(1, abs=1e-4)


def test_one_step_off_staleness_is_exactly_one_and_corrected_for(mssr, warm, server, tmp_path):
    run = trained(mssr, warm, server, tmp_path / "run", *ONE_STEP_OFF)
    lines = run.metrics[1:]
    assert [line["rollout/staleness"] for line in lines] == [0] + [1] * (STEPS - 1)
    assert lines[0]["rollout/logp_gap_max"] < 1e-4
    for line in lines[1:]:
        assert line["rollout/logp_gap_mean"] > 1e-4  # the policy has moved since it sampled
        assert abs(line["policy/tis_weight"] - 1) > 1e-6  # and the loss corrects for it
    assert all("val/accuracy" in line for line in lines if line["step"] in (3, STEPS))


def test_what_it_hides_is_reported(mssr, warm, server, tmp_path):
    """The metrics have the seconds of generation and those that the step waited for it."""
    from mssr.observe.metrics import read_metrics

    run = trained(mssr, warm, server, tmp_path / "run", *ONE_STEP_OFF)
    for line in read_metrics(run.path / "metrics.jsonl")[1:]:
        assert line["perf/rollout_seconds"] > 0 and line["perf/generate_seconds"] >= 0


def test_a_one_step_off_run_can_be_resumed(mssr, warm, server, tmp_path):
    run = trained(mssr, warm, server, tmp_path / "run", *ONE_STEP_OFF)
    longer = [setting.replace(f"train.steps={STEPS}", f"train.steps={STEPS + 2}") for setting in run.settings]
    mssr("train", warm, *longer, "--resume").check()
    # The batch in progress is lost: the first one after resuming is sampled from the weights of its own step.
    assert [line["rollout/staleness"] for line in run.metrics[1:]] == [0, 1, 1, 1, 1, 0, 1]


def test_no_server_is_one_line(mssr, warm, tmp_path):
    ended = mssr(
        "train", warm, f"run_dir={tmp_path}", "rollout.engine=servers", "rollout.servers=[http://127.0.0.1:9]",
        "rollout.server_timeout_s=1",
    )  # fmt: skip
    assert "http://127.0.0.1:9" in ended.line
