"""The report of `bench.kernels` on a terminal."""

from rich.console import Console
from rich.table import Table

from .jobs import POLICY
from .losses import sentences
from .reports import spoilt

COLUMNS = ("ms", "spread", "to eager", "MiB", "to eager", "of roof", "logp", "H", "dH", "dW")
ERRORS = ("logp", "entropy", "d_hidden", "d_weight")


def show(report: dict, console: Console | None = None):
    console = console or Console(highlight=False, width=None if Console().is_terminal else 150)
    console.print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    if report["roofs"]:
        products = ", ".join(
            f"{dtype} {value:.3g} TFLOP/s" for dtype, value in report["roofs"]["matmul_tflops"].items()
        )
        console.print(f"roofs, measured in this run: {products}; copy {report['roofs']['copy_gb_per_s']:.3g} GB/s")
    for case in report["cases"]:
        console.print(table(case))
    lost = sentences(report, name_of)
    if report["cases"]:
        console.print("Where ours lose:" if lost else "No provider was faster or smaller than ours in any case.")
    for sentence in lost:
        console.print(f"  {sentence}")
    if why := spoilt(report["cases"]):
        console.print(f"{why}.")
    for line in report["not_run"]:
        console.print(f"not run: {line}")
    console.print(f"{report['seconds']:.0f} s")


def name_of(case: dict) -> str:
    head = case["model"] or f"D {case['d']} V {case['v']}"
    softcap = f" softcap {case['softcap']:g}" if case["softcap"] else ""
    return f"{case['task']}, {head} N {case['n']} {case['dtype']} {case['rows']}{softcap}"


def table(case: dict) -> Table:
    title = f"{name_of(case)} (mean entropy {case['mean_entropy']:.2f} nats); errors against float64"
    found = Table(title=title, title_justify="left", caption=works(case), caption_justify="left")
    found.add_column("")
    for column in COLUMNS:
        found.add_column(column, justify="right", no_wrap=True)
    failures = []
    for name, result in case["providers"].items():
        if "error" in result:
            failures.append(f"{name}: {result['error']}")
            continue
        found.add_row(name, *cells(result), style="bold" if name.startswith("mssr") else "")
    if failures:
        found.caption += "\nnot measured: " + "; ".join(failures)
    return found


def cells(result: dict) -> list[str]:
    times = sorted(result["seconds_all"])
    errors = [result["errors"].get(key) for key in ERRORS]
    return [
        f"{1e3 * result['seconds']:.4g}",
        f"{1e3 * times[0]:.3g}-{1e3 * times[-1]:.3g}",
        optional(result.get("time_ratio"), ".3f"),
        optional(result.get("peak_extra_mib"), ",.0f"),
        optional(result.get("memory_ratio"), ".3f"),
        optional(result.get("share_of_roof"), ".0%"),
        *(optional(error, ".0e") for error in errors),
    ]


def optional(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def works(case: dict) -> str:
    """What the providers compute, where it is not the whole policy loss."""
    others = {}
    for name, result in case["providers"].items():
        if result["work"] != POLICY and "error" not in result:
            others.setdefault(result["work"], []).append(name)
    return "; ".join([f"work: {POLICY}", *(f"{', '.join(names)}: {work}" for work, names in others.items())])
