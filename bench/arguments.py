"""Options that several commands have."""

import argparse

import torch


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """Exit with one line, without the usage, which is several."""
        self.exit(2, f"{self.prog}: {message}; --help lists the options\n")


def parser(docstring: str, **options) -> argparse.ArgumentParser:
    """Return a parser that describes the command by the first line of its module's docstring."""
    return Parser(description=docstring.split("\n")[0], **options)


def add_device(parser: argparse.ArgumentParser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", type=_device, default=default, metavar="{cpu,cuda}", help="default: cuda if available, else cpu"
    )


def _device(name: str) -> str:
    if name not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{name}: choose cpu or cuda")
    if name == "cuda" and (why := why_no_gpu()):
        raise argparse.ArgumentTypeError(f"cuda, but {why}: take --device cpu, or run `mssr doctor`")
    return name


def why_no_gpu() -> str | None:
    if torch.cuda.is_available():
        return None
    return "torch sees no GPU" if torch.version.cuda else f"torch {torch.__version__} is built for the CPU only"


def add_dtype(parser: argparse.ArgumentParser, *choices: str, **options) -> None:
    """The default is that of `default_dtype`, once the device is known."""
    parser.add_argument("--dtype", choices=choices, help="default: float32 on a CPU, bfloat16 on CUDA", **options)


def default_dtype(device: str) -> str:
    return "float32" if device == "cpu" else "bfloat16"


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value
