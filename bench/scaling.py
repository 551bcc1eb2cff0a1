"""Time and memory of the head as N, V and D grow, one at a time.

    python -m bench.scaling [--out FOLDER]      # FOLDER/scaling.json

Eager and our modes, forward and backward; eager and ours also forward alone. Each axis has four points, 1/2 to 4 times
the base shape, and an exponent fitted in log-log: 1 is proportional growth, 0 none. The workspace is smaller than the logits
of every point.
"""

import sys
from pathlib import Path

from mssr.cli import run_command

from . import arguments as options
from . import report as report_of
from . import tables
from .jobs import Settings
from .kernels import Run
from .shapes import Shape
from .tables import AXES

FACTORS = (0.5, 1, 2, 4)
OURS = ["mssr exact", "mssr sparse", "mssr recompute", "mssr forward"]
PRESETS = {  # base shape, and MiB of workspace
    "cpu": (Shape(None, 512, 256, 16384, "float32", "realistic"), 8),
    "cuda": (Shape(None, 4096, 2048, 65536, "bfloat16", "realistic"), 128),
}


def main(words: list[str] | None = None) -> int:
    parser = options.parser(__doc__)
    options.add_device(parser)
    parser.add_argument("--repeats", type=options.positive, default=5, help="default: 5")
    parser.add_argument("--out", type=Path, metavar="WHERE", help=f"folder for {report_of.SCALING}, or a FILE.json")
    arguments = parser.parse_args(words)
    base, workspace_mib = PRESETS[arguments.device]
    settings = Settings(arguments.device, arguments.repeats, workspace_mib=workspace_mib, input_sets=1)
    report = report_of.new("bench.scaling", words, arguments.device, settings._asdict())
    report["settings"] |= {axis: getattr(base, axis) for axis in AXES}
    path = report_of.file_at(arguments.out, report_of.SCALING)
    report_of.refuse_other_file(path)
    run = Run(report, path, settings)
    for shape in run.fitting(points(base)):
        run.measure(shape, ["loss", "forward"], OURS)
    report_of.show(tables.scaling(report))
    return int(bool(report["not_run"]) or any(map(report_of.failures, report["cases"])))


def points(base: Shape) -> list[Shape]:
    """Return the shapes on all axes; the base shape, which is on every axis, is in the list once."""
    grown = (base._replace(**{axis: int(factor * getattr(base, axis))}) for axis in AXES for factor in FACTORS)
    return list(dict.fromkeys(grown))


if __name__ == "__main__":
    run_command(lambda: sys.exit(main()))
