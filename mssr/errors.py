"""The errors a user can cause and mend, and the end that a signal asks for."""

import signal


class UserError(Exception):
    """One line: what is wrong, where (key, file, row, token), and what to do.

    The command line prints the line and exits with 2, without a traceback.
    """


class Diverged(UserError):
    """Training broke the policy, or can make no step any more; the command line exits with 3."""


class Interrupted(Exception):
    """It ends because a signal asked for it, and can go on. exit_code: as a shell reports it."""

    def __init__(self, number: int, what_is_kept: str) -> None:
        super().__init__(f"{signal.Signals(number).name}: {what_is_kept}")
        self.exit_code = 128 + number


class BadRow(UserError):
    """A dataset row that cannot be used; `data.on_bad_row: skip` counts it and goes on."""

    def __init__(self, row: int, source: str, reason: str) -> None:
        super().__init__(f"{source}, row {row}: {reason}")
        self.row = row
        self.reason = reason
