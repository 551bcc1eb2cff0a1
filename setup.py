"""One distribution, `mssr`, with two packages: the trainer (`mssr`) and the kernels (`mssr_kernels`).

The base install is what the kernels need, torch and triton: whoever drops the fused loss into another trainer gets
nothing else. `pip install -e '.[train]'` adds the trainer's libraries; constraints.txt has the tested versions.
"""

import re
import runpy
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "mssr/__init__.py").read_text())[1]
versions = runpy.run_path(str(HERE / "mssr/versions.py"))
requirement = versions["requirement"]

EXTRAS = {extra: [requirement(package) for package in packages] for extra, packages in versions["EXTRAS"].items()}
EXTRAS |= {
    "dev": [
        "import-linter>=2.13",
        "scikit-learn>=1.6",  # the demo's handwritten digits
        "pytest>=8.1",
        "pytest-random-order>=1.1",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.12",
        "build>=1.2",
    ],
}
EXTRAS["dev"] += EXTRAS["bench"]  # peers are oracles too
EXTRAS["dev"] += EXTRAS["judge"]
EXTRAS["dev"] += [one for tracker in ("wandb", "mlflow", "trackio", "swanlab") for one in EXTRAS[tracker]]
EXTRAS["all"] = [requirement for name in ("train", "vllm", "bench", "dev") for requirement in EXTRAS[name]]

setup(
    name="mssr",
    version=VERSION,
    description="Single-rollout reinforcement learning for vision-language models, and LM-head kernels without logits",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["mssr", "mssr.*"]) + find_packages("kernels"),
    package_dir={"mssr_kernels": "kernels/mssr_kernels"},
    package_data={"mssr_kernels": ["py.typed"]},
    install_requires=[requirement("torch"), f"{requirement('triton')}; platform_system == 'Linux'"],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["mssr = mssr.cli:main"]},
)
