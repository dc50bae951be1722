"""The one exception for mistakes a user can make and mend."""

from __future__ import annotations


class UserError(Exception):
    """One line: which file, which value, what to do."""
