"""Recommend a `vocab_drop_tol`: the largest power of two whose gradient errors stay below those of 16-bit eager.

    python -m bench.tolerance [--n 1024 --d 1024 --v 32768 --dtype bfloat16 --json FILE]

An error is the norm of the difference to the float64 gradient of the same 16-bit inputs, over the norm of that gradient.
Eager rounds its logits to 16 bits; ours does not, so its error comes from the tolerance.
"""

import argparse
from pathlib import Path

import torch

from mssr.cli import run_command
from mssr_kernels import linear_policy_loss

from . import accuracy, estimate, inputs, machine, room
from . import arguments as options
from . import report as report_of
from .jobs import CONFIG, POLICY, eager
from .room import Need
from .shapes import Shape

POWERS = range(-1, -15, -1)


def main(argv: list[str] | None = None) -> None:
    parser = options.parser(__doc__)
    parser.add_argument("--n", type=options.positive, default=1024, help="tokens (default 1024)")
    parser.add_argument("--d", type=options.positive, default=1024, help="hidden size (default 1024)")
    parser.add_argument("--v", type=options.positive, default=32768, help="vocabulary (default 32768)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    options.add_device(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    arguments = parser.parse_args(argv)
    settings = vars(arguments).copy()
    file = settings.pop("json")
    report_of.refuse_other_file(file)
    shape = Shape(None, arguments.n, arguments.d, arguments.v, arguments.dtype, "")
    words = report_of.size(shape._asdict())
    need = Need(words, estimate.tolerance_bytes(shape), lambda _: "lower --n or --v")
    room.fitting({shape: need}, arguments.device, "shape")
    report = {"machine": machine.facts(arguments.device), **settings, "rows": {}}
    for kind in ("peaked", "realistic"):
        report["rows"][kind] = errors(arguments, kind)
        print_errors(kind, report["rows"][kind])
    report_of.save(report, file)


def errors(arguments: argparse.Namespace, kind: str) -> dict:
    """Return the errors of the gradients by hidden and weight, by name: eager, exact and every tolerance."""
    shape = (arguments.n, arguments.d, arguments.v)
    data = inputs.make(*shape, getattr(torch, arguments.dtype), arguments.device, kind)
    exact = accuracy.exact(data, POLICY, arguments.n)

    def error(loss: torch.Tensor) -> list[float]:
        data.hidden.grad = data.weight.grad = None
        loss.backward()
        return list(accuracy.errors(exact, None, None, data.hidden.grad, data.weight.grad).values())

    found = {"eager": error(eager(data))}
    for power in (None, *POWERS):
        tolerance = None if power is None else 2.0**power
        loss = linear_policy_loss(*data[:5], config=CONFIG, vocab_drop_tol=tolerance).loss
        found["exact" if power is None else f"2^{power}"] = error(loss)
    below = (p for p in POWERS if all(a <= b for a, b in zip(found[f"2^{p}"], found["eager"])))
    return {"mean_entropy": data.mean_entropy, "errors": found, "recommended": next(below, None)}


def print_errors(kind: str, result: dict):
    print(f"{kind} rows, mean entropy {result['mean_entropy']:.2f} nats: error of dhidden, dweight against float64")
    for name, values in result["errors"].items():
        print(f"  {name:<8}{values[0]:>10.1e}{values[1]:>10.1e}")
    print(f"  recommended: 2^{result['recommended']}\n")


if __name__ == "__main__":
    run_command(main)
