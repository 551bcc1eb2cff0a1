"""End a failing run with the first test that failed, what it expected, and the command that runs it again."""

import os
import shlex
import sys

import pytest

LINES, WIDTH = 4, 150  # at most, of a failure's message


@pytest.hookimpl(wrapper=True, tryfirst=True)  # the outermost wrapper writes last
def pytest_terminal_summary(terminalreporter):
    yield
    reports = [report for kind in ("failed", "error") for report in terminalreporter.stats.get(kind, [])]
    if not reports:
        return
    terminalreporter.write_sep("=", f"{len(reports)} failed, the first one", red=True)
    terminalreporter.write_line(reports[0].nodeid, red=True)
    for line in said(reports[0]):
        terminalreporter.write_line("    " + line)
    terminalreporter.write_line("again: " + command(reports[0].nodeid))
    if len(reports) > 1:
        terminalreporter.write_line(f"all {len(reports)} again: {command('--last-failed')}")


def said(report) -> list[str]:
    """Return the first lines of the exception's message. Without one (a worker died), the report's last lines."""
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = [
        line.strip()[:WIDTH] for line in (crash.message if crash else str(report.longrepr)).splitlines() if line.strip()
    ]
    if any(
        "Traceback (most recent call last)" in line for line in lines
    ):  # output of a command: its error is at the end
        return [*lines[:1], *lines[1 - LINES :]]
    return lines[:LINES] if crash else lines[-LINES:]


def command(what: str) -> str:
    return f"{os.path.relpath(sys.executable)} -m pytest {shlex.quote(what)}"
