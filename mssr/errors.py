"""Errors that a user can cause and fix, and the end of a run by a signal."""

import signal


def shortened(text: object, longest: int = 120) -> str:
    """Return the text for use in an error: on one line, printable, and cut in the middle if it is long."""
    line = " ".join(str(text).split())
    if len(line) > longest:
        line = f"{line[: longest // 2]}...{line[-longest // 2 :]} ({len(line):,} characters)"
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in line)


class UserError(Exception):
    """One line: what is wrong, where (key, file, row, token), and what to do.

    The command line prints the line and exits with 2, without a traceback.
    """


class Diverged(UserError):
    """Training broke the policy or cannot continue; the command line exits with 3."""


class Interrupted(Exception):
    """A signal ended the command. exit_code: the shell's code for this signal."""

    def __init__(self, number: int, what_is_kept: str) -> None:
        super().__init__(f"{signal.Signals(number).name}: {what_is_kept}")
        self.exit_code = 128 + number


class BadRow(UserError):
    """A dataset row that cannot be used; `data.on_bad_row: skip` counts and skips it."""

    def __init__(self, row: int, source: str, reason: str) -> None:
        super().__init__(f"{source}, row {row}: {reason}")
        self.row = row
        self.source = source
        self.reason = reason
