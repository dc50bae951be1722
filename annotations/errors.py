"""The one exception for mistakes that a user can correct."""

from __future__ import annotations


class UserError(Exception):
    """One line: which file, which value, what to do."""
