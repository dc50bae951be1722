"""The one exception for mistakes that a user can correct, and errors as one line."""

from __future__ import annotations


class UserError(Exception):
    """One line: which file, which value, what to do."""


def one_line(error: BaseException) -> str:
    """Return the message of an error without line ends and runs of blanks; empty where it has none."""
    return " ".join(str(error).split())
