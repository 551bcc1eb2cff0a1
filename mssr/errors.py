"""The errors a user can cause and mend, and the end that a signal asks for."""

import signal


class UserError(Exception):
    """One line: what is wrong, where (key, file, row, token), and what to do.

    The command line prints the line and exits with 2, without a traceback.
    """


class Diverged(UserError):
    """Training broke the policy, or can make no step any more; the command line exits with 3."""


class Interrupted(Exception):
    """A run has saved and ends because a signal asked for it. exit_code: as a shell reports it; the run is not finished."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"{signal.Signals(number).name}: saved step {step}; go on with --resume")
        self.exit_code = 128 + number


class BadRow(UserError):
    """A dataset row that cannot be used; `data.on_bad_row: skip` counts it and goes on."""

    def __init__(self, row: int, source: str, reason: str) -> None:
        super().__init__(f"{source}, row {row}: {reason}")
        self.row = row
        self.reason = reason
