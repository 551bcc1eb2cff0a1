"""Recommend a `vocab_drop_tol`: the largest power of two whose errors stay below those of 16-bit eager.

    python -m bench.tolerance [--n 1024 --d 1024 --v 32768 --dtype bfloat16 --json FILE]

An error is the norm of the difference to the float64 gradient of the same 16-bit inputs, over the norm of that gradient.
Eager rounds its logits to the dtype of the operands; ours does not, so that its error comes from the tolerance.
"""

import argparse
import json
from pathlib import Path

import torch

from mssr_kernels import linear_policy_loss, reference

from . import inputs, machine
from .jobs import CONFIG, eager

POWERS = range(-1, -15, -1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=1024)
    parser.add_argument("--d", type=int, default=1024)
    parser.add_argument("--v", type=int, default=32768)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args(argv)
    report = {"machine": machine.facts(arguments.device), **vars(arguments), "rows": {}}
    for kind in ("peaked", "realistic"):
        report["rows"][kind] = errors(arguments, kind)
        print_errors(kind, report["rows"][kind])
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=2) + "\n")


def errors(arguments: argparse.Namespace, kind: str) -> dict:
    """Return relative errors of the gradients of hidden and weight, by name: eager, exact and every tolerance."""
    shape = (arguments.n, arguments.d, arguments.v)
    data = inputs.make(*shape, getattr(torch, arguments.dtype), arguments.device, kind)
    exact = [t.detach().double().requires_grad_() for t in data[:2]]
    reference.linear_policy_loss(*exact, *data[2:5], config=CONFIG).loss.backward()

    def error(loss: torch.Tensor) -> list[float]:
        data.hidden.grad = data.weight.grad = None
        loss.backward()
        return [((t.grad.double() - e.grad).norm() / e.grad.norm()).item() for t, e in zip(data[:2], exact)]

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
    main()
