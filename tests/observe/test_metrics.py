import json
import math
import os

import pytest

from mssr.errors import UserError
from mssr.observe.metrics import MetricsLog, read_metrics
from mssr.observe.plots import plot_curves


def lines(run_dir):
    return (run_dir / "metrics.jsonl").read_text().splitlines()


def test_a_line_is_json_with_step_then_time_then_the_values(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(3, {"train/reward": 1, "policy/entropy": 0.25})
    record = json.loads(lines(tmp_path)[0])  # before close: every line is flushed
    assert list(record) == ["step", "time", "train/reward", "policy/entropy"]
    assert record["step"] == 3 and record["train/reward"] == 1.0 and record["policy/entropy"] == 0.25


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_say_is_null_and_reads_as_nan(tmp_path, value):
    log = MetricsLog(tmp_path)
    log.write(1, {"train/reward": value})
    assert '"train/reward": null' in lines(tmp_path)[0]
    assert math.isnan(read_metrics(tmp_path / "metrics.jsonl")[0]["train/reward"])


def test_lists_are_written_too(tmp_path):
    MetricsLog(tmp_path).write(1, {"tracker/bins": [[2, 0.5, 1.0]], "tracker/brier": 0.25})
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (record["tracker/bins"], record["tracker/brier"]) == ([[2, 0.5, 1.0]], 0.25)


def test_a_resumed_file_equals_the_uninterrupted_one(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (1, 2):
        log.write(step, {"train/reward": step / 10})
    position = log.position
    kept = (tmp_path / "metrics.jsonl").read_bytes()
    assert position == len(kept)
    log.write(3, {"train/reward": 99.0})
    log.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "time"')  # kill -9 in the middle of a line

    resumed = MetricsLog(tmp_path, resume_at=position)
    assert (tmp_path / "metrics.jsonl").read_bytes() == kept
    assert resumed.position == position and resumed.dropped == 1
    resumed.write(3, {"train/reward": 0.3})
    resumed.close()
    assert [(r["step"], r["train/reward"]) for r in read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
    ]


def test_a_run_resumed_at_its_very_start_begins_an_empty_file(tmp_path):
    log = MetricsLog(tmp_path, resume_at=0)
    log.write(1, {"train/reward": 0.5})
    log.close()
    before = (tmp_path / "metrics.jsonl").read_text()
    for number in (1, 2):
        again = MetricsLog(tmp_path, resume_at=0)
        assert lines(tmp_path) == [] and again.set_aside == tmp_path / f"metrics.jsonl.{number}"
        assert (tmp_path / "metrics.jsonl.1").read_text() == before  # nothing is cut
        again.write(1, {"train/reward": 0.25})
        again.close()


def test_a_file_shorter_than_the_checkpoint_says_is_refused(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(1, {})
    with pytest.raises(
        UserError, match=f"has no line that ends at byte {log.position + 1}, where the checkpoint was saved"
    ):
        MetricsLog(tmp_path, resume_at=log.position + 1)


def test_a_position_inside_a_line_is_refused_and_the_file_left_alone(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(1, {"train/reward": 0.5})
    log.close()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="has no line that ends at byte"):
        MetricsLog(tmp_path, resume_at=len(before) - 3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_new_run_does_not_write_over_an_old_one(tmp_path):
    log = MetricsLog(tmp_path)
    MetricsLog(tmp_path).close()  # an empty file is not an old run
    log.write(1, {})
    with pytest.raises(UserError, match="--resume") as error:
        MetricsLog(tmp_path)
    assert "\n" not in str(error.value)


def test_reading_leaves_out_a_torn_last_line_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 2.0}\n{"step": 2, "a"')
    assert read_metrics(path) == [{"step": 1, "a": 2.0}]
    path.write_text('{"step": 1}\n{"step": 2, \n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2: not JSON"):
        read_metrics(path)
    with pytest.raises(UserError, match="no such metrics file"):
        read_metrics(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match=f"{tmp_path}: cannot be read: Is a directory"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("line", ["[1]", "3", "null", '{"a": 1.0}', '{"step": 2, "a": "b"}'])
def test_a_line_that_is_no_metrics_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "train/reward": 0.5}}\n{line}\n')
    with pytest.raises(UserError, match="line 2: no metrics of a step; expected a metrics.jsonl"):
        plot_curves({"run": path}, tmp_path / "curves.png")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_said_in_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = MetricsLog(tmp_path)
    with pytest.raises(UserError, match="metrics.jsonl: cannot write metrics: No space left on device"):
        log.write(1, {"train/reward": 0.5})
    log.close()  # not again
