import json

from mssr.observe.results import accuracy_gained, places


def write_metrics(folder, *accuracies):
    """One line per step; None: no validation."""
    lines = [{"step": step} | ({} if one is None else {"val/accuracy": one}) for step, one in enumerate(accuracies)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_first_and_the_last_validation(tmp_path):
    write_metrics(tmp_path, 0.25, None, 0.75, None, 0.5)
    assert accuracy_gained(tmp_path) == ["validation accuracy 25.0% before RL, 50.0% after (+25.0 points)"]


def test_no_validation_or_only_one(tmp_path):
    write_metrics(tmp_path, None, None)
    assert accuracy_gained(tmp_path) == []
    write_metrics(tmp_path, None, 0.5)
    assert accuracy_gained(tmp_path) == []


def test_only_what_is_there_is_named(tmp_path):
    draws = f"`mssr plot {tmp_path}` draws {tmp_path}/curves.png"
    assert places(tmp_path) == [f"curves     {draws}"]
    for step in (40, 120, 80):
        folder = tmp_path / "rollouts" / f"step_{step:06d}"
        folder.mkdir(parents=True)
        (folder / "index.html").touch()
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "model").mkdir()
    assert places(tmp_path) == [
        f"curves     {tmp_path}/tensorboard; {draws}",
        f"rollouts   {tmp_path}/rollouts/step_000120/index.html   (open it in a browser)",
        f"model      {tmp_path}/model",
    ]
