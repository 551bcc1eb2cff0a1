"""The wheel, built from a copy of the checkout and used outside of it."""

import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mssr import __version__ as VERSION
from mssr.extras import what_to_install
from mssr.versions import EXTRAS, TESTED

ROOT = Path(__file__).parents[2]


def checkout_files():
    """Return tracked and untracked files that git does not ignore; without git, all but builds and runs."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        names = listed.stdout.split("\0")[:-1]
    else:
        skipped = {".venv", "runs", "build", "dist", "__pycache__", ".pytest_cache", ".ruff_cache"}
        names = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if skipped.isdisjoint(path.parts)]
    return [name for name in names if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in checkout_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out), str(copy)]
    pip(*build)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--target", str(folder), str(wheel))
    return folder


@pytest.fixture(scope="module")
def kernels_only(installed, tmp_path_factory):
    """What `pip install .` gives: the wheel, torch and triton, and what these require; no other library is importable."""
    folder = tmp_path_factory.mktemp("kernels_only")
    for path in installed.iterdir():
        (folder / path.name).symlink_to(path)
    waiting, seen = ["torch", "triton"], set()
    while waiting:
        name = re.match(r"[\w.-]+", waiting.pop())[0]
        if name in seen or not any(importlib.metadata.distributions(name=name)):
            continue
        seen.add(name)
        distribution = importlib.metadata.distribution(name)
        waiting += [line for line in distribution.requires or () if "extra ==" not in line]
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__", "bin"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(distribution.locate_file(top))
    return folder


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def python(*arguments, installed, cwd):
    env = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, cwd=cwd, timeout=120)


def test_the_wheel_holds_both_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"mssr", "mssr_kernels"}
    source = {str(path.relative_to(ROOT)) for path in (ROOT / "mssr").rglob("*.py")}
    source |= {str(path.relative_to(ROOT / "kernels")) for path in (ROOT / "kernels" / "mssr_kernels").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == source
    assert "mssr_kernels/py.typed" in names


def metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_string(archive.read(name).decode())


def test_the_base_installation_needs_torch_and_triton_only(wheel):
    required = metadata(wheel).get_all("Requires-Dist")
    base = {re.match(r"[\w-]+", line)[0] for line in required if "extra ==" not in line}
    assert base == {"torch", "triton"}


def test_extras_and_command(wheel):
    extras = {"train", "vllm", "flash", "liger", "trl", "bench", "judge", "dev", "all"}
    assert set(metadata(wheel).get_all("Provides-Extra")) == extras
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "mssr = mssr.cli:main" in archive.read(name).decode()


def test_the_installed_loss_runs_without_the_trainers_libraries(installed, tmp_path):
    code = """
import sys, torch, mssr_kernels
from mssr_kernels import PolicyLossConfig, linear_policy_loss
hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(32, 8, requires_grad=True)
target, advantage = torch.arange(6), torch.ones(6)
linear_policy_loss(hidden, weight, target, advantage, config=PolicyLossConfig()).loss.backward()
assert weight.grad.abs().sum() > 0
heavy = {"transformers", "deepspeed", "pydantic", "datasets", "mssr"} & set(sys.modules)
assert not heavy, heavy
print(mssr_kernels.__version__, mssr_kernels.__file__)
"""
    done = python("-c", code, installed=installed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    version, file = done.stdout.split(maxsplit=1)
    assert file.startswith(str(installed)) and version == VERSION


def test_the_installed_command_runs(installed, tmp_path):
    done = python("-m", "mssr", "--help", installed=installed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("train", "sft", "eval", "serve", "export", "plan", "doctor"))


TRAIN = "is not installed; it is in the extra `train`: in the checkout, pip install -e '.[train]'"


IMPORTS_TORCH = pytest.mark.slow("3 s each, to import torch; the same hook as in the others")


@pytest.mark.parametrize(
    "command, line",
    [
        (["-m", "mssr"], f"mssr: typer {TRAIN}"),
        (["-m", "mssr", "doctor", "--integration", "trl"], f"mssr: typer {TRAIN}"),
        (["-c", "from mssr.cli import main; main()"], f"mssr: typer {TRAIN}"),  # the script `mssr`
        (["-m", "mssr.rollout.vllm.install"], f"mssr: pyyaml {TRAIN}"),
        pytest.param(["examples/plain_loop.py"], f"mssr: transformers {TRAIN}", marks=IMPORTS_TORCH),
        (["examples/trl_grpo.py"], f"mssr: datasets {TRAIN}"),
        pytest.param(["examples/verl_log_probs.py"], f"mssr: transformers {TRAIN}", marks=IMPORTS_TORCH),
        pytest.param(["-m", "bench.kernels"], f"mssr: typer {TRAIN}", marks=IMPORTS_TORCH),
        (["-m", "bench.plots"], f"mssr: matplotlib {TRAIN}"),
        (["-m", "bench.study"], f"mssr: typer {TRAIN}"),
        pytest.param(["-m", "examples.digits.demo"], f"mssr: pydantic {TRAIN}", marks=IMPORTS_TORCH),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_with_the_kernels_alone_each_command_names_the_extra(kernels_only, tmp_path, command, line):
    for name in ("bench", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = python("-S", *command, installed=kernels_only, cwd=tmp_path)
    said = [
        text for text in done.stderr.splitlines() if "UserWarning: Failed to initialize NumPy" not in text
    ]  # torch's
    assert done.returncode == 2 and said[-1] == line and len(said) <= 2 and "Traceback" not in done.stderr, done.stderr


def test_each_library_of_an_extra_is_recognised_by_its_module():
    modules = {"pyyaml": "yaml", "pillow": "PIL"}
    for extra, packages in EXTRAS.items():
        for package in packages:
            line = what_to_install(modules.get(package, package.replace("-", "_")))
            assert line.startswith(f"{package} is not installed") and (extra == "bench" or f"'.[{extra}]'" in line)
    assert what_to_install("no_such_module") is None  # a bug of ours: its traceback is needed


def test_the_tested_versions_are_those_of_the_constraints():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pinned = dict(line.split("==") for line in lines)
    assert {name: pinned.get(name) for name in TESTED} == TESTED


def test_extras_allow_what_was_tested(wheel):
    """Every pinned version is inside the range that its requirement states."""
    from packaging.requirements import Requirement

    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for line in metadata(wheel).get_all("Requires-Dist"):
        requirement = Requirement(line)
        if requirement.name in pinned:
            assert requirement.specifier.contains(pinned[requirement.name]), line


def test_no_file_names_a_machine():
    """No file contains a local path of a developer's machine or the address of a package host."""
    local = re.compile(r"(?<![\w.}])/(work|root|home|farm)/\w|://(pypi|files\.pythonhosted|download\.pytorch)")
    found = []
    for name in checkout_files():
        try:
            text = (ROOT / name).read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{name}: {line.strip()}" for line in text.splitlines() if local.search(line)]
    assert not [line for line in found if not line.startswith("tests/packaging/")]
