"""The errors a user can cause and mend."""


class UserError(Exception):
    """One line: what is wrong, where (key, file, row, token), and what to do.

    The command line prints the line and exits with 2, without a traceback.
    """


class BadRow(UserError):
    """A dataset row that cannot be used; `data.on_bad_row: skip` counts it and goes on."""

    def __init__(self, row: int, source: str, reason: str) -> None:
        super().__init__(f"{source}, row {row}: {reason}")
        self.row = row
        self.reason = reason
