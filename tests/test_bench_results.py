"""Generated from measured figures: tables, plots, sentences on where we lose, exponents."""

import json
import re

import pytest

from bench import gpu, plots, readme, scaling, tables
from bench.report import load
from bench.shapes import Shape
from mssr.errors import UserError

POLICY, CE = "policy loss with entropy", "cross-entropy alone"
MARKED = "# Title\n\n<!-- bench:{} -->\nold\n<!-- /bench -->\n\nEnd.\n"


def found(seconds: float, mib: float, error: float, work: str = POLICY) -> dict:
    return {
        "work": work, "seconds": seconds, "seconds_all": [seconds, seconds], "time_ratio": seconds / 0.4,
        "peak_extra_mib": mib, "share_of_roof": 0.1 / seconds,
        "errors": {"logp": error / 2, "d_weight": error},
    }  # fmt: skip


def kernels_report() -> dict:
    providers = {
        "eager": found(0.4, 300, 1e-6),
        "mssr exact": found(0.36, 80, 1.5e-6),
        "mssr sparse": found(0.15, 85, 2e-4),
        "torch linear CE": found(0.3, 300, 1e-6, CE),
        "quack CE": {"work": CE, "skipped": "not installed: pip install quack-kernels"},
        "cce": {"work": CE, "error": "RuntimeError: no"},
    }
    shape = {"model": None, "n": 512, "d": 256, "v": 32768, "dtype": "float32", "rows": "realistic"}
    tasks = ("forward", "loss")
    return {
        "command": "python -m bench.kernels --quick",
        "date": "2026-11-21",
        "machine": {"python": "3.11.7", "torch": "2.13.0", "device": "a CPU, 2 threads"},
        "settings": {"repeats": 2, "seed": 0},
        "roofs": {"matmul_tflops": {"float32": 0.14}, "copy_gb_per_s": 9.1},
        "cases": [{**shape, "task": task, "mean_entropy": 0.43, "providers": providers} for task in tasks],
    }


def step_report() -> dict:
    head = {"parameters": 79e6, "layers": 4, "vocabulary": 65536, "response_tokens": 1370, "tokens_per_second": 214.0}
    head |= {"seconds": 9.6, "seconds_spread": [9.0, 10.0], "mfu": 0.56, "peak_gib": 3.0, "extra_gib": 1.5}
    return {
        "command": "python -m bench.step --size 65k",
        "date": "2026-11-21",
        "settings": {"size": "65k", "tokens": 2048, "dtype": "float32"},
        "machine": {"torch": "2.13.0", "device": "a CPU"},
        "roof": {"tflops": 0.1, "source": "a large product"},
        "cases": [
            {"head": "eager", "work": POLICY, **head, "time_ratio": 1.0, "extra_ratio": 1.0},
            {"head": "mssr", "work": POLICY, **head, "seconds": 12.0, "extra_gib": 0.9},
            {"head": "liger", "work": CE, "skipped": "not installed: pip install liger-kernel"},
        ],
    }


def scaling_report() -> dict:
    """Eager's time and memory grow as N; our time grows as N, our memory not at all."""
    shape = {"d": 64, "v": 1024, "task": "loss"}
    providers = lambda n: {  # noqa: E731
        "eager": {"seconds": 1e-3 * n, "peak_extra_mib": 2.0 * n},
        "mssr exact": {"seconds": 5e-4 * n, "peak_extra_mib": 7.0},
        "mssr sparse": {"error": "no"},
    }
    return kernels_report() | {
        "command": "python -m bench.scaling",
        "settings": {"repeats": 5, "n": 512, "d": 64, "v": 1024},
        "cases": [{"n": n, **shape, "providers": providers(n)} for n in (256, 512, 1024, 2048)],
    }


@pytest.fixture
def root(tmp_path):
    (tmp_path / "README.md").write_text(MARKED.format("kernels"))
    write(tmp_path, "cpu_2026-11-21", kernels=kernels_report())
    return tmp_path


def write(root, name: str, **reports):
    folder = root / "bench" / "results" / name
    folder.mkdir(parents=True, exist_ok=True)
    for kind, report in reports.items():
        (folder / f"{kind}.json").write_text(json.dumps(report))
    return folder


def cells(text: str, provider: str) -> list[str]:
    """Return the cells of the first table line that begins with the provider."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {provider} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_committed_readmes_agree_with_the_results(capsys):
    assert readme.main(["--check"]) == 0, capsys.readouterr()


def test_a_table_is_written_and_then_checks(root, capsys):
    assert readme.main(["--check"], root) == 1
    assert (
        "README.md: differs; run python -m bench.readme" in capsys.readouterr().out
        and "old" in (root / "README.md").read_text()
    )
    assert readme.main([], root) == 0
    assert readme.main(["--check"], root) == 0
    text = (root / "README.md").read_text()
    assert text.startswith("# Title\n\n<!-- bench:kernels -->\n") and text.endswith("<!-- /bench -->\n\nEnd.\n")
    # The first case with task "loss".
    assert "Forward and backward, N 512, D 256, V 32,768, float32, realistic rows**, mean entropy 0.43 nats" in text
    errors = "logp 8e-07, dW 2e-06"
    assert cells(text, "**mssr exact**") == [
        "**mssr exact**",
        "360 ms",
        "0.90",
        "80 MiB",
        "0.27",
        "28%",
        errors,
        POLICY,
    ]
    assert cells(text, "quack CE")[1] == "not installed: pip install quack-kernels"
    assert cells(text, "cce")[1] == "failed: RuntimeError: no"
    for fact in ("`python -m bench.kernels --quick`, 2026-11-21, on a CPU, 2 threads", "torch 2.13.0", "float32 0.14"):
        assert fact in text
    assert "bench/results/cpu_2026-11-21/README.md" in text  # the page of the folder, which is generated, too
    page = (root / "bench/results/cpu_2026-11-21/README.md").read_text()
    assert page.count("mean entropy") == 2


def test_an_edited_table_and_a_new_result_are_found(root):
    readme.main([], root)
    file = root / "README.md"
    text = file.read_text()
    file.write_text(text.replace("360 ms", "260 ms"))
    assert readme.main(["--check"], root) == 1
    file.write_text(text)
    assert readme.main(["--check"], root) == 0
    report = kernels_report()
    report["cases"][0]["providers"]["mssr exact"]["time_ratio"] = 0.7
    write(root, "cpu_2026-11-21", kernels=report)
    assert readme.main(["--check"], root) == 1


def test_the_newest_of_each_machine_is_taken(root):
    write(root, "cpu_2026-11-22", kernels=kernels_report() | {"date": "2026-11-22"})
    write(root, "h200_2026-10-01", kernels=kernels_report() | {"date": "2026-10-01"})
    readme.main([], root)
    text = (root / "README.md").read_text()
    assert [date in text for date in ("2026-11-21", "2026-11-22", "2026-10-01")] == [False, True, True]


def test_reports_of_kernels_can_have_other_names(root):
    wide = kernels_report()
    for case in wide["cases"]:
        case |= {"d": 1024, "v": 65536}
    folder = write(root, "cpu_2026-11-21", kernels_wide=wide)
    (folder / "kernels.png").touch()  # of kernels.json
    (root / "README.md").write_text(MARKED.format("kernels_wide"))
    assert readme.main([], root) == 0
    text, page = (root / "README.md").read_text(), (folder / "README.md").read_text()
    assert "V 65,536" in text and "V 32,768" not in text and "kernels.png" not in text
    assert "V 65,536" in page and "V 32,768" in page and page.count("kernels.png") == 1


def test_step_and_scaling_have_tables(root):
    folder = write(root, "cpu_2026-11-21", step=step_report(), scaling=scaling_report())
    (root / "README.md").write_text(MARKED.format("step"))
    assert readme.main([], root) == 0
    text, page = (root / "README.md").read_text(), (folder / "README.md").read_text()
    assert cells(text, "**mssr**")[1:6] == ["12 s (9 s to 10 s)", "", "214", "56.0%", "3.00 GiB"]
    assert cells(text, "liger")[1] == "not installed: pip install liger-kernel" and "failed" not in text
    assert (
        "79 M parameters, 4 layers" in text and "**mssr** is slower than eager in 1 of 1 cases, by up to 1.25x" in text
    )
    exponents = "| **mssr exact** | forward and backward | 1.00 | 0.00 |  |  |  |  |"
    assert exponents in page


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (MARKED.format("speed"), "<!-- bench:speed -->: unknown; known are kernels, kernels_<what>, step"),
        (MARKED.format("step"), "no step.json in a folder of bench/results"),
        ("<!-- bench:kernels -->\n", "has no <!-- /bench --> after it"),
        ("<!-- bench:kernels -->\n" + MARKED.format("kernels"), "has no <!-- /bench --> after it"),
    ],
)
def test_a_marker_that_cannot_be_filled_is_a_mistake(text, says, root):
    (root / "README.md").write_text(text)
    with pytest.raises(UserError, match=re.escape(says)):
        readme.main(["--check"], root)


def test_where_we_lose_is_worked_out():
    text = tables.where_we_lose(kernels_report()["cases"])
    ours, sparse = text.splitlines()[2:]
    # 0.36 / 0.3; 1.5 times eager's error is below the limit of 2.
    assert ours == f"- **mssr exact** is slower than torch linear CE ({CE}) in 2 of 2 cases, by up to 1.2x."
    assert sparse == "- **mssr sparse** errs more than eager in 2 of 2 cases, by up to 200x."
    noted = kernels_report()["cases"]
    for case in noted:
        case["providers"]["trl"] = found(0.1, 300, 1e-6, f"{POLICY}; products made again")
    assert "slower than trl in 2 of 2 cases" in tables.where_we_lose(noted).replace(f"torch linear CE ({CE})", "")
    noted[0]["providers"]["mssr exact"]["errors"]["logp"] = float("nan")
    assert "errs more than eager in 2 of 2 cases, by up to infx" in tables.where_we_lose(noted).splitlines()[2]
    alone = [{"providers": {"eager": found(0.4, 300, 1e-6), "mssr exact": found(0.4, 300, 1e-6)}}]
    assert tables.where_we_lose(alone).splitlines()[2] == "- **mssr exact** loses to none of the others."


def test_caveats_are_stated(root):
    cases = kernels_report()["cases"]
    assert "D 256 is far narrower than a model's head" in tables.caveats(cases) and "100 %" not in tables.caveats(cases)
    cases[1]["providers"]["eager"]["share_of_roof"] = 1.01
    assert "above 100 %" in tables.caveats(cases)
    assert tables.caveats([case | {"d": 3584} for case in kernels_report()["cases"]]) == ""
    readme.main([], root)
    for file in ("README.md", "bench/results/cpu_2026-11-21/README.md"):
        assert "- D 256 is far narrower" in (root / file).read_text()


def test_a_picture(root):
    written = plots.plot(root / "bench/results/cpu_2026-11-21")
    assert written.name == "kernels.png" and written.read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_a_file(root, tmp_path):
    """What `bench.kernels --out FILE.json` wrote; and the report of another benchmark."""
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(kernels_report()))
    assert plots.plot(file) == tmp_path / "mine.png" and (tmp_path / "mine.png").read_bytes().startswith(b"\x89PNG")
    file.write_text(json.dumps({"command": "python -m bench.step", "cases": [{"head": "mssr"}]}))
    with pytest.raises(UserError, match=r"mine\.json: not a report of bench\.kernels, but of `python -m bench\.step`"):
        plots.plot(file)


def test_bars_have_their_value_and_failures_their_reason():
    figure = plots.plot_cases(kernels_report())
    assert len(figure.axes) == 4  # time and memory of two cases
    words = [text.get_text().strip() for text in figure.axes[2].texts]
    assert words[1] == "0.90×  360 ms"
    assert words[-2:] == ["not installed: pip install quack-kernels", "failed: RuntimeError: no"]
    assert [bar.get_width() for bar in figure.axes[2].patches] == pytest.approx([1, 0.9, 0.375, 0.75, 0, 0])
    colours = [bar.get_facecolor() for bar in figure.axes[2].patches]
    assert colours[1] == colours[2] != colours[3] != colours[0]


def test_bars_without_eager_are_seconds():
    report = kernels_report()
    for case in report["cases"]:
        case["providers"]["eager"] = {"work": POLICY, "error": "OutOfMemoryError"}
        for of_provider in case["providers"].values():
            of_provider.pop("time_ratio", None)
    axes = plots.plot_cases(report).axes[0]
    assert axes.patches[1].get_width() == 0.36 and "eager did not run" in axes.get_xlabel()


def test_no_report_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="kernels.json: cannot be read"):
        plots.main([str(tmp_path)])


def test_exponents():
    assert tables.exponent([(size, 3 * size**1.5) for size in (10, 20, 40, 80)]) == pytest.approx(1.5)
    assert tables.exponent([(1, 4.0), (2, 2.0)]) == pytest.approx(-1)
    report = scaling_report()
    report["cases"].append(report["cases"][0] | {"n": 1024, "d": 128})  # not on the axis of N
    found = tables.exponents(report)
    assert found["eager", "loss"] == pytest.approx({("n", "seconds"): 1.0, ("n", "peak_extra_mib"): 1.0})
    ours = {("n", "seconds"): 1.0, ("n", "peak_extra_mib"): 0.0}
    assert found["mssr exact", "loss"] == pytest.approx(ours, abs=1e-9) and len(found) == 2


def test_the_points_of_scaling():
    base, _ = scaling.PRESETS["cpu"]
    shapes = scaling.points(base)
    assert len(shapes) == 10 == len(set(shapes)) and base in shapes
    assert {shape.v for shape in shapes if (shape.n, shape.d) == (base.n, base.d)} == {8192, 16384, 32768, 65536}


@pytest.mark.slow("30 s: eight processes of bench.scaling")
def test_scaling_measures_its_points(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "FACTORS", (1, 4))
    monkeypatch.setattr(scaling, "OURS", [])
    monkeypatch.setattr(scaling, "PRESETS", {"cpu": (Shape(None, 256, 16, 4096, "float32", "realistic"), 1)})
    assert scaling.main(["--device", "cpu", "--repeats", "1", "--out", str(tmp_path)]) == 0
    report = load(tmp_path, "scaling.json")
    assert len(report["cases"]) == 8 and "exponent of" in capsys.readouterr().out
    assert 0.7 < tables.exponents(report)["eager", "loss"]["n", "peak_extra_mib"] < 1.3


def test_a_benchmark_that_fails_fails_the_gpu_command(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "PARTS", (("kernels", 60, ["bench.kernels", "--no-such-option"]),))
    assert gpu.main(["--out", str(tmp_path)]) == 1
