"""Options that several commands have."""

import argparse

import torch


def parser(docstring: str, **options) -> argparse.ArgumentParser:
    """Return a parser that describes the command by the first line of its module's docstring."""
    return argparse.ArgumentParser(description=docstring.split("\n")[0], **options)


def add_device(parser: argparse.ArgumentParser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default=default, help="default: cuda if available, else cpu"
    )


def add_dtype(parser: argparse.ArgumentParser, *choices: str, **options) -> None:
    """The default is that of `default_dtype`, once the device is known."""
    parser.add_argument("--dtype", choices=choices, help="default: float32 on a CPU, bfloat16 on CUDA", **options)


def default_dtype(device: str) -> str:
    return "float32" if device == "cpu" else "bfloat16"


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value
