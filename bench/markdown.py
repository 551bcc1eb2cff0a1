"""Numbers and tables in Markdown."""

from collections.abc import Iterable

from .report import is_ours


def seconds(value: float) -> str:
    """Return seconds or milliseconds with three digits."""
    return f"{value:.3g} s" if value >= 0.9995 else f"{1e3 * value:.3g} ms"


def mib(value: float) -> str:
    return f"{value / 1024:.2f} GiB" if value >= 10240 else f"{value:,.0f} MiB"


def number(found: dict, what: str, form: str = ".2f") -> str:
    return format(found[what], form) if found.get(what) is not None else ""


def title(provider: str) -> str:
    return f"**{provider}**" if is_ours(provider) else provider


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table; short rows are filled up."""
    header = list(header)
    lines = [header, ["---"] * len(header), *([*row, *[""] * len(header)][: len(header)] for row in map(list, rows))]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def bullets(lines: Iterable[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)
