"""User mistakes on the command line: one line on stderr, exit code 2, no traceback."""

import json
import shutil
import socket

import pytest

from mssr.cli import main


@pytest.fixture
def config(material):
    return material / "config.yaml"


@pytest.mark.parametrize(
    "override, words",
    [
        ("train.stepz=3", "unknown key train.stepz; did you mean train.steps?"),
        ("train.steps=x", "train.steps"),
        ("train.steps", "expected key=value"),
        ("device=cuda", "device: cuda, but torch sees no GPU"),
        ("model.path=/no/such/model", "model.path /no/such/model: no such folder"),
        ("model.path=/nope", "model.path /nope: no such folder"),
        ("data.train=/no/such/rows.jsonl", "/no/such/rows.jsonl: no such file or directory"),
    ],
)
def test_a_wrong_setting(mssr, config, tmp_path, override, words):
    assert words in mssr("train", config, f"run_dir={tmp_path / 'run'}", override).line
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_is_not_there_is_said_before_the_model_is_looked_for(mssr, config, tmp_path):
    line = mssr("train", config, "device=cuda", "model.path=nobody/nothing", f"run_dir={tmp_path / 'run'}").line
    assert line.startswith("device: cuda, but torch sees no GPU")


def test_a_missing_config(mssr):
    assert mssr("train", "/no/such.yaml").line == "/no/such.yaml: no such config file"


def test_a_port_in_use(mssr, config, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        line = mssr("train", config, f"run_dir={tmp_path / 'run'}", MASTER_PORT=port).line
    assert f"port {port}" in line and "MASTER_PORT" in line


def test_a_rollout_server_on_an_unknown_host(mssr, config, tmp_path):
    servers = ["rollout.engine=servers", "rollout.servers=[http://nowhere.invalid:8000]"]
    ended = mssr("train", config, f"run_dir={tmp_path / 'run'}", *servers)
    assert ended.line.startswith("rollout.servers http://nowhere.invalid:8000: ")
    assert "loading" not in ended.out and not (tmp_path / "run").exists()


def test_a_model_of_another_family(mssr, config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    line = mssr("train", config, f"model.path={tmp_path}", f"run_dir={tmp_path / 'run'}").line
    assert f"model.path {tmp_path}" in line and "gpt2" in line and "qwen2_5_vl" in line


def test_a_model_cut_short(mssr, material, config, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(material / "untrained", model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    line = mssr("train", config, f"model.path={model}", f"run_dir={tmp_path / 'run'}").line
    assert f"model.path {model}" in line


def test_responses_that_ranks_do_not_divide(mssr, config, tmp_path):
    overrides = [f"run_dir={tmp_path / 'run'}", "train.responses_per_update=1"]
    for ended in mssr.ranks(2, "train", config, *overrides):
        assert "train.responses_per_update 1 is not a multiple of the 2 ranks" in ended.line


@pytest.fixture
def rows_with_a_bad_one(tmp_path):
    rows = [{"problem": f"{i} + {i}", "answer": str(2 * i)} for i in range(1, 17)]
    rows[3]["answer"] = ""
    rows[5]["images"] = ["nowhere.png"]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_bad_rows_fail_with_their_index(mssr, config, rows_with_a_bad_one, tmp_path):
    line = mssr("train", config, f"data.train={rows_with_a_bad_one}", f"run_dir={tmp_path / 'run'}").line
    assert "2 of 16 rows cannot be used" in line
    assert "row 3: `answer` is missing" in line and "row 5: image 1 of 1" in line and "data.on_bad_row: skip" in line


def test_bad_rows_are_skipped_on_request(mssr, config, rows_with_a_bad_one, tmp_path):
    """The problems are text only, which a vision-language model can train on too."""
    overrides = [f"data.train={rows_with_a_bad_one}", "data.on_bad_row=skip", f"run_dir={tmp_path / 'run'}"]
    mssr("train", config, *overrides, "train.steps=1", "rollout.max_gap=1").check()
    records = (tmp_path / "run" / "rollouts" / "step_000001" / "rollouts.jsonl").read_text().splitlines()
    assert {json.loads(record)["row"] for record in records}.isdisjoint({3, 5})


def test_a_run_dir_that_cannot_be_written(mssr, config, tmp_path):
    (tmp_path / "file").write_text("")
    line = mssr("train", config, f"run_dir={tmp_path / 'file' / 'run'}").line
    assert f"run_dir {tmp_path / 'file' / 'run'}: cannot be written: Not a directory" in line


def test_eval_without_problems(mssr, config):
    assert "data.val is not set" in mssr("eval", config, "data.val=null").line


def test_a_plot_of_nothing(mssr, tmp_path):
    assert "no such metrics file" in mssr("plot", tmp_path).line


def test_doctor_reports(mssr):
    ended = mssr("doctor")
    assert ended.code in (0, 1) and "torch" in ended.out and not ended.err


def plot_that_raises(monkeypatch, error):
    def raises(*_):
        raise error

    monkeypatch.setattr("mssr.observe.plots.plot_curves", raises)
    monkeypatch.setattr("sys.argv", ["mssr", "plot", "run"])


@pytest.mark.parametrize("error", [EOFError("ran out of input"), BrokenPipeError("worker")])
def test_an_error_that_click_would_swallow_is_raised(monkeypatch, error):
    """click prints "Aborted." for any EOFError, and ends without a word for any broken pipe."""
    plot_that_raises(monkeypatch, error)
    with pytest.raises(RuntimeError, match=str(error)):
        main()


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    plot_that_raises(monkeypatch, KeyboardInterrupt())
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code, capsys.readouterr().err) == (130, "mssr: SIGINT: stopped\n")
