"""One distribution, `mssr`, with two packages: the trainer (`mssr`) and the kernels (`mssr_kernels`).

The base install is what the kernels need, torch and triton: whoever drops the fused loss into another trainer gets
nothing else. `pip install -e '.[train]'` adds the trainer's libraries; constraints.txt has the tested versions.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "mssr/__init__.py").read_text())[1]

EXTRAS = {
    "train": [
        "transformers>=5.16.1,<5.20",
        "deepspeed>=0.19.8,<0.20",
        "datasets>=4",
        "math-verify>=0.9,<0.10",
        "peft>=0.20",
        "pydantic>=2.11,<3",
        "typer>=0.16",
        "rich>=13.9",
        "tensorboard>=2.19",
        "matplotlib>=3.10",
        "pyyaml>=6",
        "packaging>=24",
        "pillow>=11",
        "psutil>=6",
        "nvidia-ml-py>=13",
        "scikit-learn>=1.6",  # the demo's handwritten digits
        "scipy>=1.13",
        "numpy>=2",
    ],
    "vllm": ["vllm>=0.26,<0.33"],
    "flash": ["flash-attn>=2.8.3,<3"],
    "liger": ["liger-kernel>=0.8.5,<0.9"],
    "trl": ["trl>=1.15,<1.17"],
    "bench": ["liger-kernel>=0.8.5,<0.9", "cut-cross-entropy>=25.1,<26", "trl>=1.15,<1.17"],
    "dev": [
        "pytest>=8.1",
        "pytest-random-order>=1.1",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.12",
        "build>=1.2",
    ],
}
EXTRAS["dev"] += EXTRAS["bench"]  # peers are oracles too
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
    install_requires=["torch>=2.11,<2.15", "triton>=3.6,<3.10; platform_system == 'Linux'"],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["mssr = mssr.cli:main"]},
)
